"""--dry-run: every stage says what it would do, with right numbers, and writes nothing but caches."""

import re
import sys
from pathlib import Path

import pytest
import torch

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.convert import sprint_from_teacher
from toy_stage import tiny_sana
from training.__main__ import main
from training.autoencoder import build_autoencoder
from training.config import Config, load_config
from training.dry_run import Looked
from training.loop import Draws, run
from training.optim import Ema, adamw, apply_gradients
from training.memory import GIB, checkpointed_gib, more_micro_batches, standing_gib, try_step
from training.teacher import build_teacher

SIZES = ["ae_channels=8,8,16,16,16", "ae_latent_channels=8", "ae_batch=4", "heads=2", "cross_heads=2", "layers=3", "teacher_batch=4", "controlnet_layers=1",
         "controlnet_batch=4", "jump_batch=4", "student_batch=4", "disc_blocks=0,2", "autoguidance=0"]


def start_folder(folder: Path) -> Path:
    """A run folder in which every stage of the chain finds what it starts from, with random weights."""
    config = load_config("tiny-cpu", SIZES)
    torch.manual_seed(0)
    build_autoencoder(config).save_pretrained(folder / "autoencoder" / "vae")
    teacher = build_teacher(config, 8, config.size_px // 16, 384)
    teacher.save_pretrained(folder / "teacher" / "transformer")
    teacher.save_pretrained(folder / "controlnet" / "transformer")
    controlnet = SanaSprintControlNetModel.from_transformer(teacher, 1)
    controlnet.save_pretrained(folder / "controlnet" / "controlnet")
    for name, network in (("transformer", teacher), ("controlnet", controlnet)):
        sprint_from_teacher(network).save_pretrained(folder / "jump" / name)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return start_folder(tmp_path_factory.mktemp("run"))


def dry(monkeypatch, capsys, out: Path, stage: str, *sets: str) -> str:
    monkeypatch.setattr(sys, "argv", ["training", stage, "--recipe", "tiny-cpu", "--out", str(out), "--dry-run", *(f"--set={s}" for s in [*SIZES, *sets])])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("stage, part, call", [
    ("autoencoder", "vae", "Encoder(hidden_states [16, 3, 32, 32] float32)"),
    ("teacher", "model", "SanaTransformer2DModel(hidden_states [4, 8, 4, 4] float32"),
    ("controlnet", "pair", "SanaSprintControlNetModel(hidden_states [4, 8, 4, 4] float32"),
    ("jump", "student", "TrigFlowTeacher(x [4, 8, 4, 4] float32, t [4] float32"),
    ("student", "student", "TrigFlowTeacher(x [8, 8, 4, 4] float32, t [8] float32"),  # the teacher, with and without guidance, in one call
    ("decoder", "decoder", "Decoder(hidden_states [4, 8, 4, 4] float32)"),
])
def test_every_stage_can_be_looked_at(out, monkeypatch, capsys, stage, part, call):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if "cache" not in p.parts and p.is_file()}
    said = dry(monkeypatch, capsys, out, stage, "optimizer=came")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if "cache" not in p.parts and p.is_file()} == before
    assert call in said and re.search(rf"\n{part} +[\d,]+ +[\d,]+\n", said)
    assert "* heads = 2   (default 8)" in said and "\n  scm_std = 1.6" in said and "* optimizer = 'came'" in said
    assert float(re.search(r"activations +([\d.]+)", said)[1]) > 0


def test_a_dry_run_of_all_passes_over_what_cannot_be_looked_at_yet(tmp_path, monkeypatch, capsys):
    said = dry(monkeypatch, capsys, tmp_path, "all")
    assert "autoencoder: step 0 to 60" in said and "teacher: cannot be looked at yet: no autoencoder" in said and "export: trains nothing" in said


class Small:
    """The tiny transformer with everything a stage has."""

    def __init__(self, **settings):
        self.config = Config(precision="fp32", preview_steps=0, tracker="none", **settings)
        self.model = tiny_sana().float()
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.ema = Ema(self.model, 0.9)
        self.opt = adamw([(list(self.model.parameters()), 1e-3)], self.config)
        self.parts = {"model": self.model, "ema": self.ema, "opt": self.opt, "frozen": self.frozen}

    def forward(self, draws: Draws, count: int = 8) -> torch.Tensor:
        x = self.frozen(draws.normal(count, 4, 4, 4))
        return self.model(hidden_states=x, encoder_hidden_states=draws.normal(count, 3, 12), timestep=draws.uniform(count), return_dict=False)[0]

    def train_step(self, step: int, draws: Draws) -> dict[str, float]:
        for part in draws.parts(self.config.micro_batches):
            (self.forward(part, 8 // self.config.micro_batches).square().mean() / self.config.micro_batches).backward()
        numbers = apply_gradients(self.opt, step, 3, 1.0, self.config)
        self.ema.update(self.model, step)
        return numbers


def really_kept(small: Small) -> int:
    """Bytes that autograd keeps in a real forward pass, weights left out."""
    weights = {p.untyped_storage()._cdata for p in small.model.parameters()}
    storages = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in weights:
            storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        small.forward(Draws(0, 0))
    return sum(s.nbytes() for s in storages.values())


def test_the_counted_activations_are_those_that_autograd_keeps():
    small = Small()
    trial = try_step(small.train_step, 0, Draws(0, 0))
    assert trial.activations == pytest.approx(really_kept(small), rel=0.1)
    halves = Small(micro_batches=2)
    assert try_step(halves.train_step, 0, Draws(0, 0)).activations == pytest.approx(trial.activations / 2, rel=0.1)
    checkpointed = checkpointed_gib(trial, small.train_step, 0, Draws(0, 0)) * GIB
    assert checkpointed < 0.5 * trial.activations and not small.model.is_gradient_checkpointing


def test_a_trial_changes_nothing():
    small, untouched = Small(), Small()
    try_step(small.train_step, 0, Draws(0, 0))
    for name in ("model", "ema", "frozen"):
        torch.testing.assert_close(dict(small.parts[name].state_dict()), dict(untouched.parts[name].state_dict()), rtol=0, atol=0)
    assert not small.opt.state and all(p.grad is None for p in small.model.parameters())
    assert torch.isfinite(small.forward(Draws(0, 0))).all() and small.forward(Draws(0, 0)).abs().sum() > 0  # networks compute again


def test_the_standing_memory_is_that_of_the_tensors():
    small = Small()
    small.train_step(0, Draws(0, 0))
    held = standing_gib(small.parts, small.config)
    numbers = sum(p.numel() for p in small.model.parameters())
    assert held["weights"] * GIB == pytest.approx(4 * (2 * numbers + 20)) and held["gradients"] * GIB == pytest.approx(4 * numbers)
    kept = sum(v.numel() * 4 for s in small.opt.state.values() for v in s.values() if v.ndim)
    assert held["optimiser"] * GIB == pytest.approx(kept)


def test_what_lies_in_memory_beside_the_step_is_counted(tmp_path, capsys):
    small = Small(dry_run=True)

    def gib(kind: str) -> float:
        with pytest.raises(Looked):
            run("small", tmp_path, small.config, 3, small.parts, small.train_step, 8)
        return float(re.search(rf"\n  {kind} +([\d.]+)", capsys.readouterr().out)[1])
    before = gib("networks not called")
    autoencoder = torch.nn.Linear(4096, 2048).requires_grad_(False)  # 32 MiB, which previews will want
    assert gib("networks not called") - before == pytest.approx(0.031, abs=0.0011) and autoencoder is not None
    assert 0.05 < gib("most until now") < 100


def test_run_looks_instead_of_training(tmp_path, capsys):
    small = Small(dry_run=True)
    with pytest.raises(Looked):
        run("small", tmp_path, small.config, 3, small.parts, small.train_step, 8)
    said = capsys.readouterr().out
    numbers = sum(p.numel() for p in small.model.parameters())
    assert re.search(rf"\nmodel +{numbers:,} +0\n", said) and re.search(r"\nfrozen +0 +20\n", said) and not list(tmp_path.iterdir())


def test_the_next_number_of_micro_batches_divides_the_batch():
    assert [more_micro_batches(12, Config(micro_batches=m)) for m in (1, 2, 4, 6, 12)] == [2, 3, 6, 12, None]
