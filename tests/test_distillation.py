"""From the ControlNet stage to the student: what it follows goes along and is held to; the jump stage honours the recipe; previews watch the latents."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pictures import start_distillation, write_shards
from training import jump, student
from training.base import save_folder
from training.conditions import write_condition
from training.config import Config
from training.jump import train_jump
from training.monitor import FILE
from training.pair import load_jump, start_pair, with_folders
from training.student import train_student
from training.trajectories import GROUP


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, Path]:
    """A Canny ControlNet."""
    root = tmp_path_factory.mktemp("distillation")
    write_shards(root / "data", 24, 24)
    write_shards(root / "data", 8, 8, "val")
    config, out = start_distillation(root, root / "data", condition="canny", preview_steps=1, jump_paths=GROUP, jump_steps=2, jump_batch=4, student_steps=2)
    write_condition(out / "controlnet" / "controlnet", "canny")
    return config, out


@pytest.fixture(scope="module")
def jumped(run) -> dict:
    """The jump stage with checkpointing and compile_denoiser; what it was seen to do."""
    config, out = run
    seen: dict = {"wanted": [], "calls": 0, "pairs": [], "numbers": {}}

    def compiled(wanted, function):
        seen["wanted"].append((wanted, function.__name__))

        def counted(*args):
            seen["calls"] += 1
            return function(*args)
        return counted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jump, "maybe_compile", compiled)
        patch.setattr(jump, "start_pair", lambda *args: seen["pairs"].append(start_pair(*args)) or seen["pairs"][-1])
        patch.setattr(jump, "run", watched(jump.run, seen["numbers"]))
        train_jump(replace(config, checkpointing=True, compile_denoiser=True), out)
    return seen


def watched(run, numbers: dict):
    """The loop, with the previews' numbers put into `numbers`."""
    def loop(name, out, config, steps, parts, train_step, images, preview, *rest, **more):
        run(name, out, config, steps, parts, train_step, images, lambda step, folder: numbers.update(found := preview(step, folder)) or found, *rest, **more)
    return loop


def test_the_jump_stage_checkpoints_and_compiles_as_the_recipe_says(jumped):
    assert jumped["wanted"] == [(True, "loss_of")] and jumped["calls"] == 2
    assert all(network.gradient_checkpointing for net in jumped["pairs"][0] for network in net.children())


def test_previews_of_jump_and_student_watch_the_latents(run, jumped, monkeypatch):
    config, out = run
    numbers: dict = {}
    monkeypatch.setattr(student, "run", watched(student.run, numbers))
    train_student(config, out)
    for name, found in (("jump", jumped["numbers"]), ("student", numbers)):
        assert {"latent_mean", "latent_std", "latent_drift", "sample_mean", "sample_std", "sample_drift"} < set(found), name
        assert found["latent_alarm"] == 0 and all(math.isfinite(value) for value in found.values()), name
        assert (out / name / FILE).is_file()
        # what the ControlNet follows went along
        assert json.loads((out / name / "controlnet" / "condition.json").read_text()) == {"condition": "canny"}


def test_a_controlnet_is_distilled_on_what_it_follows_only(run, jumped, tmp_path):
    config, out = run
    lines = replace(config, condition="lines")
    for stage in (train_jump, train_student):
        with pytest.raises(ValueError, match="condition=lines, but the ControlNet at .* follows canny: --set condition=canny"):
            stage(lines, out)
    with_folders(replace(lines, student_controlnet=False, flow_teacher=str(out / "controlnet")), out)  # the words alone follow nothing
    # a folder without the file is taken as it is, but not a jump on another condition
    save_folder(tmp_path / "old", {name: network for name, network in start_pair(config, out)[0].named_children()})
    old = replace(lines, flow_teacher=str(tmp_path / "old"))
    with_folders(old, out)
    with pytest.raises(ValueError, match="jump.controlnet follows canny"):
        load_jump(old, out, start_pair(old, out)[1])
