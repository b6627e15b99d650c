"""The shipped model: its size, its report, stock diffusers, and that it follows lines it has never seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from layouts import ListScheduler

from sana_app.lines import condition_from_ink
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.trigflow import sprint_timesteps
from training.data.shards import read_samples
from training.evaluate import model_hash, to_uint8
from training.metrics import line_f1

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "assets" / "models" / "emoji"


@pytest.fixture(scope="module")
def pipe():
    return SanaSprintControlNetPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)


def test_it_is_small_enough_to_ship():
    sizes = [p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(sizes) <= 100e6 and max(sizes) <= 50e6


def test_its_report_is_about_these_weights():
    assert json.loads((FOLDER / "metrics.json").read_text())["model_hash"] == model_hash(FOLDER)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stock_diffusers_draws_the_same_picture_without_lines(pipe, steps):
    stock = SanaSprintPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    stock.scheduler = ListScheduler()
    stock.set_progress_bar_config(disable=True)
    latents, five = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(3)), lambda: torch.Generator().manual_seed(5)
    common = dict(num_inference_steps=steps, timesteps=sprint_timesteps(steps), latents=latents, output_type="latent")
    theirs = stock("a red apple, 3d style", height=128, width=128, intermediate_timesteps=None, max_timesteps=None, complex_human_instruction=None,
                   max_sequence_length=32, use_resolution_binning=False, generator=five(), **common).images
    ours = pipe("a red apple, 3d style", generator=five(), **common).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_it_follows_held_out_lines(pipe):
    samples = [s for s in read_samples(ROOT / "assets" / "sample", "val") if not s.meta["toned"]][:8]
    scores = {}
    for scale in (1.0, 0.0):
        lines = torch.cat([condition_from_ink(np.ascontiguousarray(s.lines[0]).repeat(2, 0).repeat(2, 1), 128) for s in samples])
        made = pipe([s.captions[0] for s in samples], lines, scale, generator=[torch.Generator().manual_seed(i) for i in range(len(samples))], output_type="pt").images
        scores[scale] = np.mean([line_f1(s.lines[0], picture) for s, picture in zip(samples, to_uint8(made * 2 - 1))])
    assert scores[1.0] > scores[0.0] + 0.2, scores
