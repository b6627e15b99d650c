"""LoRA: what is trained, what is saved, that stock diffusers, our pipeline and the page load it, and that nothing else changes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline
from layouts import build_small_folder, build_sprint_folder, tiny_bert, tiny_transformer, tiny_vae
from safetensors import safe_open

import app
from sana_app.engine import Engine
from sana_app.model.adapter import adapter_file, load_adapter, parse_adapter, read_adapter
from sana_app.model.fast import use_token_convolutions
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.presets import EMOJI_STYLES, Preset
from sana_app.request import RenderRequest
from training import lora
from training.base import link_or_copy
from training.conditions import write_condition
from training.config import load_config
from training.data.shards import encode_png
from training.lora_pictures import captioned
from training.lora_suggest import settled, suggested

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models here are tiny: two threads that wait for each other on a busy machine cost ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_pictures(folder: Path, count: int, captions: bool = True) -> Path:
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True)
    for i in range(count):
        picture = np.full((40, 32, 3), 255, np.uint8)
        picture[8:30, 6:26] = rng.integers(0, 200, 3)
        (folder / f"{i}.png").write_bytes(encode_png(picture))
        if captions:
            (folder / f"{i}.txt").write_text("a sks house")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """base: a Sprint folder as we ship it; teacher: a flow teacher with the same text encoder and autoencoder; pictures."""
    root = tmp_path_factory.mktemp("lora")
    build_small_folder(root / "base")
    tokenizer, text_encoder = tiny_bert()
    pipe = SanaPipeline(tokenizer, text_encoder, tiny_vae(), tiny_transformer(guidance_embeds=False), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.save_pretrained(root / "teacher")
    write_pictures(root / "pictures", 3)
    return root


def config_for(places, *extra: str, base: str = "base"):
    sets = dict(base=places / base, data=places / "pictures", size_px=32, precision="fp32", lora_steps=4, lora_batch=2, lora_lr=1e-2, disc_blocks="0,2",
                lr_warmup_steps=1, save_minutes=60)
    return load_config("emoji-lora", [f"{k}={v}" for k, v in sets.items()] + list(extra))


def train(places, out: Path, *extra: str, base: str = "base") -> Path:
    lora.train_lora(config_for(places, *extra, base=base), out)
    return out / "lora"


@pytest.fixture(scope="module")
def trained(places, tmp_path_factory):
    return train(places, tmp_path_factory.mktemp("runs") / "house", "lora_alpha=8", "lora_rank=4")


def ours(places):
    return SanaSprintControlNetPipeline.from_pretrained(places / "base")


def picture(pipe, **kwargs) -> torch.Tensor:
    return pipe(prompt="a sks house", seed=5, output_type="pt", **kwargs).images


# ---- what is saved, and where it loads --------------------------------------------------------------------------


def test_the_file_is_diffusers_own_with_alpha_and_what_it_was_trained_on(trained):
    with safe_open(trained / FILE, "pt") as opened:
        names, header = list(opened.keys()), opened.metadata()
    assert len(names) == 4 * 2 * 2 * 2  # layers, attentions, q and v, A and B
    assert all(n.startswith("transformer.transformer_blocks.") and n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names)
    settings, about = json.loads(header["lora_adapter_metadata"]), json.loads(header["about"])
    assert settings["transformer.r"] == 4 and settings["transformer.lora_alpha"] == 8
    assert about["captions"] == ["a sks house"] and about["base"] == "base" and about["name"] == "house" and about["loss"] == "consistency"
    assert "/" not in json.dumps(about)  # no path of the machine it was trained on


def test_stock_diffusers_and_ours_draw_the_same_with_it_and_unloading_restores_every_bit(places, trained):
    pipe = ours(places)
    stock = SanaSprintPipeline.from_pretrained(places / "base", torch_dtype=torch.float32)
    embeds, mask = pipe.encode_prompt("a sks house")
    latents = pipe.noise(32, 32, torch.Generator().manual_seed(5))

    def stock_picture():
        return stock(prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask, latents=latents.clone(), num_inference_steps=1, intermediate_timesteps=None,
                     max_timesteps=torch.pi / 2, height=32, width=32, use_resolution_binning=False, output_type="pt").images

    def our_picture():
        return pipe(prompt_embeds=embeds, prompt_attention_mask=mask, latents=latents, output_type="pt").images
    before, stock_before = our_picture(), stock_picture()
    pipe.load_lora_weights(trained)
    stock.load_lora_weights(trained)
    after = our_picture()
    assert (after - before).abs().mean() > 1e-3
    torch.testing.assert_close(after, stock_picture(), rtol=0, atol=1e-4)
    pipe.unload_lora_weights()
    stock.unload_lora_weights()
    assert torch.equal(our_picture(), before) and torch.equal(stock_picture(), stock_before)


def test_an_adapter_of_the_teacher_loads_in_the_stock_pipeline_and_lowers_the_flow_loss(places, tmp_path, capsys):
    folder = train(places, tmp_path / "run", "lora_steps=40", "lora_batch=8", "lora_targets=q,k,v,out", base="teacher")
    assert read_adapter(folder / FILE)[2]["loss"] == "flow"
    losses = [float(line.split("flow ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "flow " in line and line.startswith("lora 40")]
    first = train(places, tmp_path / "one", "lora_steps=1", "lora_batch=8", base="teacher")
    begun = [float(line.split("flow ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if line.startswith("lora 1:")]
    assert first.exists() and len(losses) == len(begun) == 1 and losses[0] < 0.8 * begun[0]
    stock = SanaPipeline.from_pretrained(places / "teacher", torch_dtype=torch.float32)
    kwargs = dict(prompt="a sks house", negative_prompt="", num_inference_steps=2, height=32, width=32, use_resolution_binning=False, output_type="pt",
                  complex_human_instruction=None, max_sequence_length=32)
    draw = lambda: stock(generator=torch.Generator().manual_seed(0), **kwargs).images
    before = draw()
    stock.load_lora_weights(folder)
    assert (draw() - before).abs().mean() > 1e-3
    stock.unload_lora_weights()
    assert torch.equal(draw(), before)


def test_rank_and_alpha_scale_and_fused_equals_unfused(places, trained):
    pipe = ours(places)
    weights = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    tensors, _, _ = read_adapter(trained / FILE)
    base = picture(pipe)
    for scale in (1.0, 0.3):
        load_adapter(pipe, trained, scale)
        unfused = picture(pipe)
        pipe.fuse_lora(lora_scale=1.0)
        fused = {n.replace(".base_layer", ""): p.clone() for n, p in pipe.transformer.named_parameters() if "lora_" not in n}
        torch.testing.assert_close(picture(pipe), unfused, rtol=0, atol=1e-5)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        for name, weight in weights.items():
            a, b = (tensors.get(f"transformer.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
            wanted = weight if a is None else weight + scale * (8 / 4) * b @ a
            torch.testing.assert_close(fused[name], wanted, rtol=0, atol=1e-6)
    assert (unfused - base).abs().mean() > 0


# ---- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, extra", [("teacher", ()), ("base", ()), ("base", ("lora_teacher",))], ids=["flow", "consistency", "distillation"])
def test_only_the_adapter_changes(places, tmp_path, monkeypatch, base, extra):
    loaded, real = [], lora.load_network
    monkeypatch.setattr(lora, "load_network", lambda folder: loaded.append((real(folder), folder)) or loaded[-1][0])
    train(places, tmp_path / "run", *(f"{key}={places / 'teacher'}" for key in extra), base=base)
    assert len(loaded) == 1 + len(extra)
    for net, folder in loaded:
        fresh = real(folder).state_dict()
        found = {k.replace(".base_layer", ""): v for k, v in net.state_dict().items() if ".lora_" not in k}
        assert found.keys() == fresh.keys() and all(torch.equal(found[k], fresh[k]) for k in fresh)
    net = loaded[0][0]
    assert all(v.abs().max() > 0 for k, v in net.state_dict().items() if ".lora_B." in k)
    if extra:  # the teacher is without it
        assert not any(".lora_" in k for k in loaded[1][0].state_dict())


def test_a_fresh_adapter_changes_nothing(places):
    net = lora.load_network(places / "base")
    x, t, text = torch.randn(2, 8, 4, 4), torch.tensor([0.4, 1.2]), torch.randn(2, 5, 24)
    before = net(x, t, text, guidance=4.5)
    lora.add_adapter(net.transformer, replace(config_for(places), lora_rank=4, lora_alpha=4.0))
    assert torch.equal(net(x, t, text, guidance=4.5), before)


@pytest.mark.parametrize("targets, layers", [("q,v", {"to_q", "to_v"}), ("q,k,v,out", {"to_q", "to_k", "to_v", "to_out/0"})])
def test_targets_are_those_of_self_and_cross_attention(places, targets, layers):
    net = lora.load_network(places / "base")
    adapter = lora.add_adapter(net.transformer, config_for(places, f"lora_targets={targets}", "lora_rank=2", "lora_alpha=2"))
    assert set(adapter) == {f"transformer_blocks/{i}/{attn}/{layer}" for i in range(4) for attn in ("attn1", "attn2") for layer in layers}


def test_an_unknown_target_is_refused(places, tmp_path):
    with pytest.raises(ValueError, match="lora_targets=q,w: wanted some of q, k, v, out"):
        train(places, tmp_path, "lora_targets=q,w")


@pytest.mark.parametrize("extra", [(), ("lora_teacher",)], ids=["consistency", "distillation"])
def test_a_run_that_died_goes_on_to_the_same_adapter(places, tmp_path, monkeypatch, extra):
    sets = ["save_minutes=0", "lora_lines=0.5"]
    if extra:  # its lines want a ControlNet in the teacher
        sets = ["save_minutes=0", f"lora_teacher={places / 'teacher'}"]
    whole = train(places, tmp_path / "whole" / "run", *sets)

    class Killed(Exception):
        pass

    calls, real = [], lora.apply_gradients

    def dies(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lora, "apply_gradients", dies)
        train(places, tmp_path / "broken" / "run", *sets)
    again = train(places, tmp_path / "broken" / "run", *sets)
    found, wanted = (read_adapter(folder / FILE)[0] for folder in (again, whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_prior_preservation_draws_the_class_before_the_training_and_weighs_it(places, tmp_path):
    prior = ["lora_prior_prompt=a house", "lora_prior_images=3"]
    plain = read_adapter(train(places, tmp_path / "plain") / FILE)[0]
    weightless = read_adapter(train(places, tmp_path / "weightless", *prior, "lora_prior_weight=0") / FILE)[0]
    weighed = read_adapter(train(places, tmp_path / "weighed", *prior) / FILE)[0]
    assert all(torch.equal(plain[k], weightless[k]) for k in plain)
    assert any(not torch.equal(plain[k], weighed[k]) for k in plain)
    (drawn,) = (tmp_path / "weighed" / "cache").glob("class-*")
    assert sorted(p.name for p in drawn.iterdir()) == [f"000{i}.{ext}" for i in range(3) for ext in ("png", "txt")]
    (twin,) = (tmp_path / "weightless" / "cache").glob("class-*")  # a function of seed and number
    assert all((twin / p.name).read_bytes() == p.read_bytes() for p in drawn.iterdir())
    assert (drawn / "0000.png").read_bytes() != (drawn / "0001.png").read_bytes()
    given = write_pictures(tmp_path / "houses", 2, captions=False)
    train(places, tmp_path / "given", f"lora_prior_data={given}", "lora_prior_prompt=a house")
    assert not list((tmp_path / "given" / "cache").glob("class-*"))


def test_pictures_without_captions_get_the_prompt_or_are_named(tmp_path):
    folder = write_pictures(tmp_path / "bare", 2, captions=False)
    (folder / "0.txt").write_text("its own")
    with pytest.raises(ValueError, match=r"1 pictures in .* have no caption \(1.png for one\).*lora_prompt"):
        captioned(str(folder), "", tmp_path / "cache", "lora_prompt")
    found = Path(captioned(str(folder), "a sks house", tmp_path / "cache", "lora_prompt"))
    assert (found / "0.txt").read_text() == "its own" and (found / "1.txt").read_text().strip() == "a sks house"
    assert not (folder / "1.txt").exists()  # the person's folder stays as it is
    (folder / "1.txt").write_text("mine")
    assert captioned(str(folder), "", tmp_path / "cache", "lora_prompt") == str(folder)


def test_what_is_missing_is_said(places, tmp_path):
    for extra, words in [(["data="], "no pictures given"), (["base="], "no model to adapt"), ([f"base={tmp_path}"], "wanted a model folder"),
                         ([f"lora_teacher={tmp_path}"], "lora_teacher=.*wanted a folder with the flow teacher"),
                         ([f"lora_teacher={places / 'base'}"], "is itself a one-step model")]:
        with pytest.raises(ValueError, match=words):
            train(places, tmp_path / "out", *extra)


def test_lines_are_learnt_from_what_the_controlnets_follow_only(places, tmp_path):
    for name in ("base", "teacher"):
        shutil.copytree(places / "base" / "controlnet", tmp_path / name / "controlnet")
        link_or_copy(places / name / "transformer", tmp_path / name / "transformer")
    for said, extra in (("base", ()), ("teacher", (f"lora_teacher={tmp_path / 'teacher'}",))):
        write_condition(tmp_path / said / "controlnet", "canny")
        with pytest.raises(ValueError, match=f"condition=lines, but the ControlNet at .*{said}.controlnet follows canny: --set condition=canny"):
            train(places, tmp_path / "out", "lora_lines=0.5", f"base={tmp_path / 'base'}", *extra)
        (tmp_path / said / "controlnet" / "condition.json").unlink()


def test_the_preview_watches_the_latents(places, tmp_path, capsys):
    folder = train(places, tmp_path / "run", "lora_steps=1")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lora 1:"))
    assert all(f"{name} " in said for name in ("latent_mean", "latent_std", "latent_drift", "sample_drift")) and (folder / "latents.json").is_file()


# ---- the suggestion ---------------------------------------------------------------------------------------------


def test_the_suggestion_meets_diffusers_example_and_grows_with_the_pictures():
    example = {key: value for key, (value, _) in suggested(5, 4, False).items()}
    assert example == {"lora_rank": 4, "lora_steps": 500, "lora_lr": 1e-4}
    for key in ("lora_rank", "lora_steps"):
        values = [suggested(n, 4, False)[key][0] for n in (1, 5, 10, 30, 100, 1000)]
        assert values == sorted(values) and values[0] < values[-1]
    assert suggested(5, 8, False)["lora_steps"][0] == 250  # as many pictures seen
    assert suggested(5, 4, True)["lora_steps"][0] == 1000  # every other step is the discriminator's


def test_the_suggestion_is_printed_with_its_reason_and_what_is_given_wins(capsys):
    config = settled(load_config("emoji-lora", ["lora_rank=3", "lora_lr=0", "lora_batch=4"]), 5, alternating=False)
    said = capsys.readouterr().out
    assert (config.lora_rank, config.lora_steps, config.lora_lr, config.lora_alpha) == (3, 500, 1e-4, 3)
    assert "lora_rank = 3 (given; suggested: 4)" in said and "lora_steps = 500 (suggested: each picture about 400 times, as in diffusers' SANA example" in said
    assert "--set lora_steps=" in said


# ---- refusals ---------------------------------------------------------------------------------------------------


def save(path: Path, tensors: dict, header: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, {"format": "pt"} | (header or {}))
    return path


def broken(kind: str, trained: Path, folder: Path) -> Path:
    tensors, settings, _ = read_adapter(trained / FILE)
    name = next(iter(tensors))
    if kind == "truncated":
        folder.mkdir(exist_ok=True)
        (folder / FILE).write_bytes((trained / FILE).read_bytes()[:-100])
        return folder
    if kind == "nan":
        tensors[name] = tensors[name] * torch.nan
    if kind == "other model":
        tensors = {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in tensors.items()}
    if kind == "half a pair":
        del tensors[name]
    if kind == "deeper model":
        tensors = {k.replace("blocks.3", "blocks.17"): v for k, v in tensors.items()}
    if kind == "comfyui":
        tensors = {f"diffusion_model.blocks.0.attn.qkv.lora_{x}.weight": torch.zeros(2, 2) for x in ("up", "down")}
    if kind == "dora":
        tensors[name.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(4)
    if kind == "empty":
        tensors = {}
    header = {"wrong rank": json.dumps(settings | {"transformer.r": 7}), "no json": "{", "other settings": json.dumps(settings | {"transformer.nonsense": 1})}
    return save(folder / FILE, tensors, {"lora_adapter_metadata": header[kind]} if kind in header else None).parent


@pytest.mark.parametrize("kind, words", [
    ("truncated", "is damaged or cut short"), ("nan", "holds NaN or infinite values"), ("other model", r"lora_A and lora_B are \(4, 64\) .* wanted \(4, 32\)"),
    ("half a pair", "has no lora_A"), ("deeper model", "the model has no layer transformer_blocks.17"), ("comfyui", "convert it to diffusers' first"),
    ("dora", "lora_magnitude_vector is not named like an adapter's weight"), ("empty", "it holds no tensors"), ("wrong rank", "do not fit its weights"),
    ("no json", "not readable JSON"), ("other settings", "do not fit its weights")])
def test_a_wrong_adapter_is_refused_with_words_and_changes_nothing(places, trained, tmp_path, kind, words):
    pipe = ours(places)
    before = picture(pipe)
    with pytest.raises(ValueError, match=words):
        load_adapter(pipe, broken(kind, trained, tmp_path / kind))
    assert torch.equal(picture(pipe), before)
    load_adapter(pipe, trained)  # and the right one still loads
    assert not torch.equal(picture(pipe), before)
    with pytest.raises(ValueError, match="an adapter is loaded already"):
        load_adapter(pipe, trained)


def test_a_published_layout_takes_an_adapter_of_its_own_width(places, trained, tmp_path):
    pipe = SanaSprintControlNetPipeline.from_pretrained(build_sprint_folder(tmp_path / "sprint"))
    assert load_adapter(pipe, trained).label == "house"


@pytest.mark.parametrize("text, wanted", [("a/b", ("a/b", 1.0)), ("a/b:0.5", ("a/b", 0.5)), ("c:/a:b", ("c:/a:b", 1.0)), ("a:-1", ("a", -1.0))])
def test_path_and_scale(text, wanted):
    assert parse_adapter(text) == (Path(wanted[0]), wanted[1])


def test_a_path_that_is_no_adapter_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    for path, words in [(tmp_path / "none", "no adapter at"), (tmp_path, "no .safetensors file"), (tmp_path / "weights.bin", "only .safetensors files")]:
        with pytest.raises(ValueError, match=words):
            adapter_file(path)
    with pytest.raises(ValueError, match="a number is wanted as the scale"):
        parse_adapter("a:nan")


# ---- the page ---------------------------------------------------------------------------------------------------


def test_the_engine_shows_it_uses_it_and_forgets_it(places, trained):
    ink = np.zeros((256, 256), np.uint8)
    ink[100:108, 20:200] = 255
    request = RenderRequest(ink=ink, prompt="a sks house", style="none", seed=3)
    engine = Engine.load(Preset("small", str(places / "base"), EMOJI_STYLES), "fp32")
    before = engine.render(request).jpeg
    engine.load_adapter(str(trained))
    assert engine.name == "small + house" and engine.adapter.captions == ("a sks house",)
    after = engine.render(request).jpeg
    assert after != before
    other = Engine.load(Preset("small", str(places / "base"), EMOJI_STYLES), "fp32", f"{trained}:0.5")
    assert other.name == "small + house × 0.5" and other.render(request).jpeg not in (before, after)
    engine.unload_adapter()
    assert engine.name == "small" and engine.render(request).jpeg == before
    assert engine.render(request).stages_ms["transformer"] == 0  # the caches work on


def test_the_fast_convolutions_carry_adapters_too(places, tmp_path):
    pipe = ours(places)
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in pipe.transformer.named_parameters():
        if name.startswith("transformer_blocks.1.ff.") and name.endswith(("inverted.weight", "point.weight")):
            name = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, weight.shape[1], 1, 1, generator=g)
            tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2, 1, 1, generator=g)
    assert len(tensors) == 4
    file, before = save(tmp_path / "conv.safetensors", tensors), picture(pipe)
    assert load_adapter(pipe, file).label == "conv"
    stock = picture(pipe)
    assert use_token_convolutions(pipe.transformer) == 4
    torch.testing.assert_close(picture(pipe), stock, rtol=0, atol=1e-5)
    assert (stock - before).abs().mean() > 1e-4


def test_the_page_shows_the_adapter_and_a_wrong_one_ends_the_program(places, trained, tmp_path, capsys):
    page = app.create(str(places / "base"), f"{trained}:0.7")
    assert "base + house × 0.7 · 32 px" in json.dumps(page.get_config_file(), ensure_ascii=False, default=str)
    assert "“a sks house”" in capsys.readouterr().out
    page.close()
    for bad, words in [(str(tmp_path / "none"), "no adapter at"), (str(broken("other model", trained, tmp_path / "other")), "does not fit this model")]:
        assert app.main(["--model", str(places / "base"), "--lora", bad]) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
