"""The chain: the loop resumes exactly, checkpoints survive kills, and the tiny recipe runs from pictures to a model folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.checkpoint import hash_file, load_checkpoint, save_checkpoint
from training.config import RECIPES, Config, load_config
from training.loop import Draws, run
from training.optim import Ema, adamw, apply_gradients, learning_rate

ROOT = Path(__file__).parent.parent


class Line:
    """A model small enough to compare bit by bit: y = w·x with AdamW, random data of each step from its draws."""

    def __init__(self, folder: Path, steps: int):
        torch.manual_seed(0)
        self.config = Config(preview_steps=0, save_minutes=0.0)
        self.model = torch.nn.Linear(4, 1)
        self.ema = Ema(self.model, 0.9)
        self.opt = adamw([(list(self.model.parameters()), 1e-2)], self.config)
        self.folder, self.steps, self.seen = folder, steps, []

    def train_step(self, step: int, draws: Draws) -> dict[str, float]:
        x = draws.normal(8, 4)
        self.seen.append((step, float(x.sum())))
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        numbers = apply_gradients(self.opt, step, self.steps, 1.0, self.config)
        self.ema.update(self.model, step)
        return {"loss": loss.item(), **numbers}

    def run(self, train_step=None) -> None:
        run("line", self.folder, self.config, self.steps, {"model": self.model, "ema": self.ema, "opt": self.opt}, train_step or self.train_step, 8)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = Line(tmp_path / "whole", 12)
    whole.run()

    class Killed(Exception):
        pass

    broken = Line(tmp_path / "broken", 12)

    def dies(step, draws):
        if step == 7:
            raise Killed
        return broken.train_step(step, draws)

    with pytest.raises(Killed):
        broken.run(dies)
    again = Line(tmp_path / "broken", 12)
    again.run()
    assert again.seen == whole.seen[7:]
    for a, b in zip([*whole.model.parameters(), *whole.ema.parameters()], [*again.model.parameters(), *again.ema.parameters()]):
        assert torch.equal(a, b)


def test_a_non_finite_gradient_skips_the_step_and_ten_stop_the_run(tmp_path):
    line = Line(tmp_path, 30)

    def poisoned(step, draws):
        if step >= 5:
            for p in line.model.parameters():
                p.grad = torch.full_like(p, float("nan"))
            return apply_gradients(line.opt, step, line.steps, 1.0, line.config)
        return line.train_step(step, draws)

    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        line.run(poisoned)
    fresh = Line(tmp_path, 30)
    step = load_checkpoint(tmp_path / "line" / "checkpoints", {"model": fresh.model, "ema": fresh.ema, "opt": fresh.opt})
    assert step >= 5
    assert all(torch.isfinite(p).all() for p in line.model.parameters())


def test_a_broken_checkpoint_falls_back_to_the_one_before(tmp_path):
    model = torch.nn.Linear(3, 3)
    for step in (1, 2, 3):
        torch.nn.init.constant_(model.weight, step)
        save_checkpoint(tmp_path, step, {"model": model})
    newest = sorted(tmp_path.glob("step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:200])
    (tmp_path / "step-0000009.pt.tmp").write_bytes(b"half")
    assert load_checkpoint(tmp_path, {"model": model}) == 2
    assert float(model.weight[0, 0]) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_flipped_bit_falls_back_to_the_one_before(tmp_path):
    """In the data of a tensor, where the archive itself has no check that torch.load reads."""
    model = torch.nn.Linear(100, 100)
    for step in (1, 2):
        torch.nn.init.constant_(model.weight, step)
        save_checkpoint(tmp_path, step, {"model": model})
    newest = tmp_path / "step-0000002.pt"
    content = bytearray(newest.read_bytes())
    content[content.index(torch.full((8,), 2.0).numpy().tobytes()) + 3] ^= 1
    newest.write_bytes(content)
    assert not torch.equal(torch.load(newest, weights_only=True)["parts"]["model"]["weight"], model.weight)  # torch takes it
    assert load_checkpoint(tmp_path, {"model": model}) == 1 and float(model.weight[0, 0]) == 1


def test_a_checkpoint_from_before_there_were_hashes_loads(tmp_path):
    model = torch.nn.Linear(3, 3)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"model": model})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000000{i}.pt{end}" for i in (2, 3) for end in ("", ".sha256")]
    hash_file(tmp_path / "step-0000003.pt").unlink()
    assert load_checkpoint(tmp_path, {"model": model}) == 3


def begin(folder: Path, steps: int, seed: int = 0, data: str = "one", code: str = "a", **settings) -> None:
    """A run of the line model with these settings, as `run` records it."""
    line = Line(folder, steps)
    line.config = Config(preview_steps=0, save_minutes=0.0, tracker="none", seed=seed, data=data, **settings)
    run("line", folder, line.config, steps, {"model": line.model, "ema": line.ema, "opt": line.opt}, line.train_step, 8, data_hash=data)


def test_a_run_that_goes_on_with_another_seed_or_other_data_is_refused(tmp_path):
    begin(tmp_path, 2)
    before = (tmp_path / "line" / "run.json").read_bytes()
    for changed, said in ((dict(seed=7), "begun with seed=0, now 7: use another --out, or delete that folder"), (dict(data="two"), "data one .hash one.*now two .hash two")):
        with pytest.raises(ValueError, match=said):
            begin(tmp_path, 4, **changed)
    assert (tmp_path / "line" / "run.json").read_bytes() == before  # what it was begun with is not forgotten
    begin(tmp_path, 4)
    shutil.rmtree(tmp_path / "line" / "checkpoints")  # nothing to go on from: a new run
    begin(tmp_path, 2, seed=7, data="two")


def test_changed_settings_are_named_and_earlier_starts_kept(tmp_path, capsys):
    begin(tmp_path, 2)
    begin(tmp_path, 4, teacher_lr=1e-4, student_steps=50, guidance=(3.0,))
    assert "line: goes on from step 2 with other settings: teacher_lr 0.001 -> 0.0001, student_steps 1000 -> 50, guidance [4.0, 4.5, 5.0] -> [3.0]\n" in capsys.readouterr().out
    begin(tmp_path, 6, teacher_lr=1e-4, student_steps=50, guidance=(3.0,))
    begin(tmp_path, 8)
    about = json.loads((tmp_path / "line" / "run.json").read_text())
    assert [(a["step"], a["config"]["teacher_lr"]) for a in [*about["earlier"], about]] == [(0, 1e-3), (2, 1e-4), (6, 1e-3)]
    assert all({"config", "code", "data", "processes"} <= set(a) for a in about["earlier"])


@pytest.mark.parametrize("old", ['{"config": {"seed": 0, "no_longer": 1}, "code": "x", "data": "one"}', "{half a fi", None])
def test_a_folder_of_an_earlier_layout_goes_on(tmp_path, capsys, old):
    begin(tmp_path, 2)
    capsys.readouterr()
    path = tmp_path / "line" / "run.json"
    path.unlink()
    if old:
        path.write_text(old)
    begin(tmp_path, 4)
    about = json.loads(path.read_text())
    assert about["data"] == "one" and about["step"] == 2 and len(about["earlier"]) == (old is not None and old.endswith("}"))


def test_a_checkpoint_of_another_shape_is_refused_with_words(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": torch.nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="does not fit this configuration"):
        load_checkpoint(tmp_path, {"model": torch.nn.Linear(4, 4)})


def test_killed_while_saving_leaves_a_readable_checkpoint(tmp_path):
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; from pathlib import Path; from training.checkpoint import save_checkpoint\n"
              f"model = torch.nn.Linear(700, 700)\nstep = 0\nprint('up', flush=True)\n"
              f"while True:\n    step += 1; save_checkpoint(Path({str(tmp_path)!r}), step, {{'model': model}})")
    model = torch.nn.Linear(700, 700)
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        process.stdout.readline()
        while not list(tmp_path.glob("step-*.pt")):
            time.sleep(0.001)
        time.sleep(0.07 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert load_checkpoint(tmp_path, {"model": model}) > 0


def test_the_learning_rate_warms_up_and_decays():
    config = Config(lr_warmup_steps=10, lr_final=0.1)
    rates = [learning_rate(1.0, s, 100, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.95
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_draws_depend_on_seed_and_step_alone():
    a, b = Draws(3, 7), Draws(3, 7)
    assert torch.equal(a.normal(5), b.normal(5)) and torch.equal(a.uniform(5), b.uniform(5))
    assert not torch.equal(Draws(3, 8).normal(5), Draws(3, 7).normal(5))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_valid_config(recipe):
    config = load_config(recipe, ["ae_steps=7", "compile=false", "guidance=1.0,2.0"])
    assert config.ae_steps == 7 and config.compile is False and config.guidance == (1.0, 2.0)
    assert max(config.disc_blocks) < config.layers and config.controlnet_layers < config.layers


@pytest.mark.parametrize("bad", ["nonsense=1", "ae_steps", "ae_steps=many", "compile=perhaps"])
def test_a_bad_override_is_named(bad):
    with pytest.raises(ValueError, match=bad.split("=")[-1] if "=" in bad and not bad.startswith("nonsense") else "key=value"):
        load_config("tiny-cpu", [bad])


def chain(out: Path, *extra: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "training", "all", "--recipe", "tiny-cpu", "--out", str(out), *extra],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_the_whole_chain_makes_a_model_that_the_pipeline_draws_with(tmp_path):
    done = chain(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    from sana_app.model.pipeline import SanaSprintControlNetPipeline
    pipe = SanaSprintControlNetPipeline.from_pretrained(tmp_path / "model")
    lines = -torch.ones(1, 3, 64, 64)
    lines[:, :, 20:44, 31:33] = 1
    picture = pipe(prompt="a red apple", control_image=lines, seed=1, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64) and torch.isfinite(picture).all()
    assert all((tmp_path / stage / "run.json").exists() for stage in ("autoencoder", "teacher", "controlnet", "jump", "student", "decoder"))
    assert list((tmp_path / "student").glob("preview-*.png"))
    assert json.loads((tmp_path / "model" / "controlnet" / "condition.json").read_text()) == {"condition": "lines"}
    assert json.loads((tmp_path / "model" / "metrics.json").read_text())["count"] == 10
    # a second run finds everything done
    again = chain(tmp_path)
    assert again.returncode == 0 and "already at step" in again.stdout and "about these weights already" in again.stdout


@pytest.mark.parametrize("recipe", ["emoji-128", "emoji-256"])
def test_the_larger_recipes_run_from_end_to_end_at_the_smallest_size(recipe, tmp_path):
    """Their own losses and settings, adversarial autoencoder and autoguidance included; two steps of everything, narrow and uncompiled."""
    config = load_config(recipe, [])
    small = {k: 2 for k in ("ae_steps", "teacher_steps", "controlnet_steps", "jump_steps", "decoder_steps")} | {k: 2 for k in vars(config) if k.endswith("_batch")}
    small |= dict(ae_channels="8," * (len(config.ae_channels) - 1) + "8", ae_latent_channels=8, ae_adv_start=0, ae_crop_px=32, heads=1, cross_heads=1, layers=3, controlnet_layers=1,
                  jump_paths=1, student_steps=4, disc_blocks="0,2", evaluate_count=2, size_px=64, data="assets/sample", compile="false", compile_denoiser="false", controlnet_weak_share=0.5,
                  preview_steps=0)
    done = subprocess.run([sys.executable, "-m", "training", "all", "--recipe", recipe, "--out", str(tmp_path), *(f"--set={k}={v}" for k, v in small.items())],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model" / "metrics.json").exists()


def test_missing_data_and_missing_stages_are_named(tmp_path):
    done = chain(tmp_path, "--set=data=/nowhere/at/all")
    assert done.returncode == 1 and "no data at /nowhere/at/all" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "training", "student", "--recipe", "tiny-cpu", "--out", str(tmp_path / "empty")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "run the" in done.stderr and "Traceback" not in done.stderr
