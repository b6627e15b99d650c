"""The student's stage, killed between two steps: student, discriminator, both optimisers and the averages end with the same bits."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from pictures import start_distillation, write_pictures
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.convert import sprint_from_teacher
from training.base import load_part, save_folder
from training.config import Config
from training.lora import train_lora
from training.student import Distillation, train_student


class Killed(Exception):
    pass


@pytest.fixture
def start(tmp_path) -> Iterator[tuple[Config, Path]]:
    """A recipe and a run folder in which the ControlNet stage is done. On one thread: two that wait for each other cost tiny models much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield start_distillation(tmp_path, write_pictures(tmp_path / "data", 8), save_minutes=0.0, scm_warmup=3, micro_batches=2, student_lr=1e-3, ladd_misaligned=True)
    torch.set_num_threads(threads)


def test_stopped_between_student_and_discriminator_it_ends_with_the_same_bits(start, monkeypatch):
    config, one = start
    two = one.with_name("two")
    shutil.copytree(one, two)
    train_student(config, one)
    backward = Distillation.backward

    def dies(self, step, *rest):
        if step == 3:  # the student's second step is done, the discriminator's second is not
            raise Killed
        return backward(self, step, *rest)

    monkeypatch.setattr(Distillation, "backward", dies)
    with pytest.raises(Killed):
        train_student(config, two)
    monkeypatch.setattr(Distillation, "backward", backward)
    torch.manual_seed(99)  # a new process has another history
    train_student(config, two)
    parts = lambda out, step: torch.load(out / "student" / "checkpoints" / f"step-{step:07d}.pt", weights_only=True)["parts"]
    torch.testing.assert_close(parts(two, 4), parts(one, 4), rtol=0, atol=0)
    # the vectors of the spectral norms are no weights, and move
    vectors = [name for name in parts(one, 4)["disc"] if name.endswith("._u")]
    assert vectors and not any(torch.equal(parts(one, 4)["disc"][name], parts(one, 3)["disc"][name]) for name in vectors if parts(one, 4)["disc"][name].numel() > 1)
    for part in ("transformer", "controlnet"):
        files = [next((out / "student" / part).glob("*.safetensors")) for out in (one, two)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("stage", ["student", "lora"])
def test_a_student_whose_every_step_fails_is_stopped_though_its_discriminator_learns(start, monkeypatch, stage):
    """A LoRA with a teacher alternates too."""
    config, out = start
    if stage == "lora":
        save_folder(out / "student", {name: sprint_from_teacher(load_part(out / "controlnet" / name, kind)) for name, kind in
                                      (("transformer", SanaTransformer2DModel), ("controlnet", SanaSprintControlNetModel))})
    consistency = Distillation.consistency
    monkeypatch.setattr(Distillation, "consistency", lambda *a: consistency(*a) * float("nan"))
    config = replace(config, student_steps=40, lora_steps=40, lora_prompt="a cat", micro_batches=1, save_minutes=60.0)
    with pytest.raises(FloatingPointError, match="10 steps in a row of network 1 of 2.*stopped at step 18"):
        {"student": train_student, "lora": train_lora}[stage](config, out)
