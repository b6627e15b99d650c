"""The evaluation on a random-weight model: what it chooses, that it repeats itself, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import build_small_folder
from pictures import write_pictures
from PIL import Image

from training.config import Config
from training.data.cache import Pixels
from training.evaluate import choose, evaluate, evaluate_run, model_hash, table

SAMPLE = Path(__file__).parent.parent / "assets" / "sample"
TIMED = ("latency_ms", "hardware")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_small_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return out, evaluate(model, SAMPLE, "val", 4, 0, out, out / "cache", runs=2)


def fake_pixels(concepts=6, styles=("flat", "3d", "noto")):
    """Two toned variants beside each plain picture."""
    meta = [{"concept": f"c{c}", "style": s, "toned": t > 0} for c in range(concepts) for s in styles for t in range(3)]
    n = len(meta)
    return Pixels(np.zeros((n, 8, 8, 3), np.uint8), np.zeros((2 * n, 8, 8), np.uint8), np.arange(0, 2 * n + 1, 2),
                  [[f"caption {i}"] for i in range(n)], meta, "hash")


def test_the_choice_takes_each_concept_and_style_once_and_no_skin_tones():
    meta = choose(fake_pixels(), 1000, seed=0).meta
    assert not any(m["toned"] for m in meta)
    assert len({(m["concept"], m["style"]) for m in meta}) == len(meta) == 18


def test_a_small_choice_spreads_over_concepts_and_styles():
    meta = choose(fake_pixels(), 6, seed=0).meta
    assert len({m["concept"] for m in meta}) == 6
    assert sorted(m["style"] for m in meta) == sorted(["flat", "3d", "noto"] * 2)


def test_another_seed_chooses_other_pictures_and_the_same_seed_the_same():
    prompts = [choose(fake_pixels(), 6, seed=s).prompts for s in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_report_has_the_flat_keys_others_read_and_is_what_was_stored(found):
    out, numbers = found
    assert json.loads((out / "metrics.json").read_text()) == numbers
    every = [f"{name}{steps}{off}" for steps in ("", "_2step", "_4step") for off in ("", "_off") for name in ("seed_diversity",)]
    every += [f"{name}_{column}" for name in ("line_f1", "sharpness_ratio") for column in ("1step", "2step", "4step", "off", "2step_off", "4step_off")]
    wanted = [*every, "psnr_db", "line_f1_real", "prompt_colour_shift", "prompt_colour_shift_2step", "prompt_colour_right_4step", "sharpness_ratio",
              "latency_ms_p50_2step", "latency_ms_p50_4step", "latency_ms_p50_off", *(f"latency_ms_{p}" for p in ("text", "condition", "controlnet", "transformer", "decode", "p50"))]
    assert all(np.isfinite(numbers[key]) for key in wanted)
    assert numbers["split"] == "val" and numbers["count"] == 4
    assert all(key in table(numbers) for key in ("line_f1", "latency_ms", "2step_off"))
    parts = sum(numbers[f"latency_ms_{p}"] for p in ("text", "condition", "controlnet", "transformer", "decode"))
    assert parts < 1.5 * numbers["latency_ms_p50"]


def test_real_pictures_follow_their_lines_better_than_another_pictures(found):
    assert found[1]["line_f1_real"] > found[1]["line_f1_chance"] + 0.3


def test_the_contact_sheet_has_six_columns_in_two_halves(found):
    sheet = Image.open(found[0] / "contact_sheet.png")
    assert sheet.width // 132 == 12 and sheet.height // 132 == 2


def test_a_second_run_gives_the_same_numbers(model, found, tmp_path):
    again = evaluate(model, SAMPLE, "val", 4, 0, tmp_path, found[0] / "cache", runs=2)
    same = lambda numbers: {k: v for k, v in numbers.items() if not k.startswith(TIMED)}
    assert same(again) == same(found[1])


def test_the_model_hash_follows_the_weights_and_not_the_reports(tmp_path):
    folder = build_small_folder(tmp_path / "a")
    before = model_hash(folder)
    (folder / "metrics.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    assert model_hash(folder) == before
    weights = next((folder / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_hash(folder) != before


def test_a_model_without_a_controlnet_is_refused_by_name(tmp_path):
    folder = build_small_folder(tmp_path / "plain", controlnet=False)
    with pytest.raises(ValueError, match="plain has no controlnet"):
        evaluate(folder, SAMPLE, "val", 4, 0, tmp_path, tmp_path / "cache")


def test_a_folder_without_a_held_out_part_is_not_called_held_out(model, tmp_path, capsys):
    write_pictures(tmp_path / "mine", 3)
    numbers = evaluate(model, tmp_path / "mine", "val", 3, 0, tmp_path / "report", tmp_path / "cache", runs=1)
    assert numbers["split"] == "train (no held-out part)" and "numbers on training pictures" in capsys.readouterr().out


def test_the_stage_measures_the_exported_model_once(model, tmp_path, capsys):
    config = Config(data=str(SAMPLE), evaluate_count=4)
    with pytest.raises(ValueError, match="run the export stage first"):
        evaluate_run(config, tmp_path)
    shutil.copytree(model, tmp_path / "model")
    evaluate_run(config, tmp_path)
    first = (tmp_path / "model" / "metrics.json").read_text()
    assert json.loads(first)["model_hash"] == model_hash(model) and "line_f1" in capsys.readouterr().out
    evaluate_run(config, tmp_path)
    assert (tmp_path / "model" / "metrics.json").read_text() == first and "already" in capsys.readouterr().out
