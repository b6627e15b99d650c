"""The engine: the pipeline's own picture, the same bytes for the same request, and caches that change nothing."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import build_small_folder, build_sprint_folder
from PIL import Image

from sana_app import bench
from sana_app.engine import STAGES, Engine
from sana_app.lines import condition_from_ink
from sana_app.presets import EMOJI_STYLES, OPEN_STYLES, PRESETS, Preset, find_model, styled
from sana_app.request import PROMPT_CHARS, RenderRequest, check_request


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models here are tiny: two threads that wait for each other on a busy machine cost ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_small_folder(tmp_path_factory.mktemp("models") / "small")


def load(folder) -> Engine:
    return Engine.load(Preset("small", str(folder), EMOJI_STYLES))


@pytest.fixture(scope="module")
def engine(folder):
    return load(folder)


def ink(y: int = 100, side: int = 256) -> np.ndarray:
    raster = np.zeros((side, side), np.uint8)
    raster[y:y + 8, 20:200] = 255
    return raster


REQUEST = RenderRequest(ink=ink(), prompt="a red apple", style="flat", seed=3)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("drawn", [True, False], ids=["lines", "empty page"])
def test_the_picture_is_the_pipelines_own(engine, steps, drawn):
    request = replace(REQUEST, steps=steps, ink=ink() if drawn else None)
    image = condition_from_ink(request.ink, engine.size) if drawn else None
    wanted = engine.pipe(prompt="a red apple, flat style", control_image=image, num_inference_steps=steps, seed=3, output_type="np")
    torch.testing.assert_close(engine.render(request).pixels, (wanted.images[0] * 255).round().astype(np.uint8), rtol=0, atol=1)


def test_the_same_request_gives_the_same_bytes_in_any_order_and_in_a_new_engine(engine, folder):
    requests = [replace(REQUEST, steps=steps, seed=seed, prompt=prompt, ink=drawing) for steps, seed, prompt, drawing in
                [(1, 3, "a cat", ink()), (2, 3, "a cat", ink()), (2, 4, "a cat", None), (1, 3, "", ink(50)), (4, 9, "a dog", ink())]]
    first = [engine.render(request).jpeg for request in requests]
    assert len(set(first)) == len(first)
    other = load(folder)
    assert [other.render(request).jpeg for request in reversed(requests)] == first[::-1]


def test_what_did_not_change_is_not_computed_again(folder):
    engine = load(folder)
    first = engine.render(REQUEST)
    cost = first.stages_ms
    assert list(cost) == [*STAGES, "total"] and all(cost[stage] > 0 for stage in STAGES)
    assert cost["total"] >= sum(cost[stage] for stage in STAGES)
    second = engine.render(REQUEST)
    assert all(second.stages_ms[stage] == 0 for stage in STAGES) and second.stages_ms["total"] < 5
    assert second.cached and not first.cached and not engine.render(replace(REQUEST, seed=9)).cached
    calls = []
    engine.pipe.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
    engine.pipe.vae.encoder.register_forward_hook(lambda *_: calls.append("condition"))
    engine.pipe.controlnet.register_forward_hook(lambda *_: calls.append("controlnet"))
    for change, computed in [({"seed": 5}, ["controlnet"]), ({"strength": 0.5}, ["controlnet"]),
                             ({"ink": ink(60)}, ["condition", "controlnet"]), ({"prompt": "a dog"}, ["text", "controlnet"]),
                             ({"ink": None}, []), ({"strength": 0.0}, []), ({"style": "noto", "ink": None}, ["text"])]:
        calls.clear()
        engine.render(replace(REQUEST, **change))
        assert calls == computed, change


def test_caches_forget_old_entries(folder):
    engine = load(folder)
    for seed in range(70):
        engine.render(replace(REQUEST, seed=seed, ink=ink(seed)))
    assert [len(c.items) for c in (engine.noises, engine.conditions, engine.frames, engine.prompts)] == [64, 8, 16, 1]


def test_strength_zero_and_an_empty_page_are_text_only(engine):
    empty = engine.render(replace(REQUEST, ink=None)).jpeg
    assert engine.render(replace(REQUEST, strength=0.0)).jpeg == empty != engine.render(REQUEST).jpeg
    assert check_request(np.zeros((256, 256), np.uint8), styles=EMOJI_STYLES).ink is None


def test_the_jpeg_shows_the_pixels(engine):
    done = engine.render(REQUEST)
    decoded = np.asarray(Image.open(io.BytesIO(done.jpeg)))
    assert decoded.shape == done.pixels.shape == (engine.size, engine.size, 3)
    assert np.abs(decoded.astype(int) - done.pixels).mean() < 12  # random weights paint noise, the worst case


def test_a_prompt_past_the_models_tokens_is_cut_and_named(engine):
    done = engine.render(replace(REQUEST, prompt="red " * 40 + "zebra"))
    assert "too long" in done.notices[0] and "zebra" in done.notices[0]
    assert engine.render(REQUEST).notices == ()


def test_prompts_that_break_tokenizers_do_not(engine):
    for text in ("", " ", "\0\x01", "\ud800 cat", "🐈‍⬛" * 100, "a" * 5000, "‮right to left"):
        request = check_request(ink(), prompt=text, styles=EMOJI_STYLES)
        assert len(request.prompt) <= PROMPT_CHARS and len(engine.render(request).jpeg) > 100


def test_a_published_folder_without_controlnet_draws_from_words_and_says_so(tmp_path):
    engine = Engine.load(find_model(str(build_sprint_folder(tmp_path / "sprint"))))
    assert engine.styles == OPEN_STYLES
    done = engine.render(RenderRequest(ink=ink(), prompt="a cat"))
    assert "no ControlNet" in done.notices[0]
    assert done.jpeg == engine.render(RenderRequest(ink=None, prompt="a cat")).jpeg


def test_model_names():
    assert find_model("emoji") is PRESETS["emoji"] is find_model(PRESETS["emoji"].source)
    assert find_model("sprint-1.6b").source == "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"
    with pytest.raises(ValueError, match="no model is called 'emojii'. Wanted: one of emoji, sprint-0.6b, sprint-1.6b, or the path"):
        find_model("emojii")
    with pytest.raises(ValueError, match="no model folder at .*nowhere"):
        Engine.load(find_model("./nowhere"))


def test_the_style_is_worded_as_in_the_training_captions():
    from training.data import captions

    for style, words in EMOJI_STYLES.items():
        for prompt in ("a red apple", "  a cat ", ""):
            assert styled(prompt, words) == captions.styled(prompt, None if style == "none" else style)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


@pytest.mark.skipif(not (Path(PRESETS["emoji"].source) / "model_index.json").is_file(), reason="the shipped model is not there")
def test_the_shipped_model_in_bf16_draws_the_fp32_picture():
    from sana_app.pad import read_examples
    from sana_app.ui import first_request, first_settings

    exact, fast = (Engine.load(PRESETS["emoji"], precision) for precision in ("fp32", "bf16"))
    found = [psnr_db(exact.render(request).pixels, fast.render(request).pixels)
             for request in (first_request(example, first_settings(example)) for example in read_examples())]
    assert min(found) >= 35, found


def test_the_bench_reports_every_stage(folder, capsys):
    assert bench.main(["--model", str(folder), "--runs", "3", "--json"]) == 0
    import json

    report = json.loads(capsys.readouterr().out)
    assert set(report["stages_ms"]) == {*STAGES, "prompt_cached", "total"}
    assert all(0 <= times["p50"] <= times["p95"] for times in report["stages_ms"].values())
    assert report["runs"] == 3 and report["size"] == 32
