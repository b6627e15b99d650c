"""Training that is killed, starved or fed nonsense: it goes on where it was, and says what happened."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.checkpoint import load_checkpoint, newest_step, save_checkpoint
from training.config import Config
from training.loop import Draws, run
from training.optim import Ema, adamw, apply_gradients, make_optimizer

ROOT = Path(__file__).parent.parent
STEPS = 30


class Server:
    """Runs the toy stage in real processes, forked from one that has torch loaded already: a start costs milliseconds."""

    def __init__(self):
        command = [sys.executable, str(ROOT / "tests" / "toy_stage.py"), "--serve", "--model", "line", "--steps", str(STEPS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, out: Path, *settings: str) -> int:
        """-> process id of the stage."""
        self.process.stdin.write(",".join([str(out), *settings]) + "\n")
        self.process.stdin.flush()
        return self.answer("pid")

    def answer(self, what: str) -> int:
        word, number = self.process.stdout.readline().split()
        assert word == what  # a number that is not a process's must never reach os.kill
        return int(number)

    def wait(self) -> int:
        """-> exit code of the stage, minus the signal where one ended it."""
        return self.answer("code")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    server.start(out)
    assert server.wait() == 0
    return out


def assert_same_end(a: Path, b: Path, steps: int = STEPS) -> None:
    """The last checkpoints hold the same bits."""
    load = lambda out: torch.load(out / "toy" / "checkpoints" / f"step-{steps:07d}.pt", weights_only=True)["parts"]
    torch.testing.assert_close(load(a), load(b), rtol=0, atol=0)


def halted(server: Server, out: Path, *settings: str) -> int:
    """Starts the stage and waits until it stands still where `settings` say; -> process id."""
    pid = server.start(out, *settings)
    while not (out / "halted").exists():
        time.sleep(0.001)
    return pid


def test_killed_again_and_again_it_ends_with_the_same_weights(server, whole, tmp_path):
    for number, step in enumerate(sorted(random.Random(0).sample(range(1, STEPS), 6))):
        while_writing = number % 2
        os.kill(halted(server, tmp_path, f"{'halt_writing' if while_writing else 'halt'}={step}"), signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert newest_step(tmp_path / "toy" / "checkpoints") == step - while_writing
        assert len(list(tmp_path.rglob("*.tmp"))) == while_writing
        (tmp_path / "halted").unlink()
    server.start(tmp_path)
    assert server.wait() == 0
    assert_same_end(whole, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def new_step(checkpoints: Path, pid: int, before: int) -> None:
    """Waits for a checkpoint later than step `before`, of a stage that does not end by itself."""
    while newest_step(checkpoints) <= before:
        os.kill(pid, 0)  # ProcessLookupError: it has ended after all
        time.sleep(0.001)


def test_killed_at_twenty_random_moments_it_resumes(server, tmp_path):
    """The stage is long enough for any machine; what an undisturbed run is compared with is the step that the last kill left, and some more."""
    rng, endless = random.Random(1), "steps=1000000"
    checkpoints = tmp_path / "killed" / "toy" / "checkpoints"
    for number in range(20):
        before, pid = newest_step(checkpoints), server.start(tmp_path / "killed", endless)
        if number % 4:  # else at any moment of its start
            new_step(checkpoints, pid, before)
        if number % 2:  # while it writes
            while not any(checkpoints.glob("*.tmp")):
                os.kill(pid, 0)
        else:
            time.sleep(rng.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    end = newest_step(checkpoints) + 3
    assert end >= 15 + 3  # each but every fourth came on by a step
    for out in ("killed", "whole"):
        os.kill(halted(server, tmp_path / out, endless, f"halt={end}"), signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert_same_end(tmp_path / "whole", tmp_path / "killed", end)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_writes_a_checkpoint_first(server, whole, tmp_path, number):
    pid = halted(server, tmp_path, "halt=10", "save_minutes=1000")  # no checkpoint of its own before the end
    os.kill(pid, number)
    (tmp_path / "halted").unlink()  # it goes on, and ends the step it is in
    assert server.wait() == 1
    assert newest_step(tmp_path / "toy" / "checkpoints") == 11
    server.start(tmp_path)
    assert server.wait() == 0
    assert_same_end(whole, tmp_path)


def test_a_full_disk_leaves_the_last_good_checkpoint_whole(tmp_path):
    model = torch.nn.Linear(700, 700)
    for step in (1, 2):
        torch.nn.init.constant_(model.weight, step)
        save_checkpoint(tmp_path, step, {"model": model})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, hard))  # a file may grow to half of what is needed
    try:
        with pytest.raises(OSError, match="could not be written.*last good checkpoint is .*step-0000002.pt; free some space"):
            save_checkpoint(tmp_path, 3, {"model": model})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000001.pt", "step-0000001.pt.sha256", "step-0000002.pt", "step-0000002.pt.sha256"]
    assert load_checkpoint(tmp_path, {"model": model}) == 2 and float(model.weight.detach()[0, 0]) == 2


class Tiny:
    """y = w·x, whose loss and gradients can be spoilt at chosen steps."""

    def __init__(self, out: Path, steps: int, bad_losses=(), bad_gradients=()):
        torch.manual_seed(0)
        self.config = Config(preview_steps=0, save_minutes=0.0, tracker="none")
        self.model = torch.nn.Linear(4, 1)
        self.opt = adamw([(list(self.model.parameters()), 1e-2)], self.config)
        self.out, self.steps, self.bad_losses, self.bad_gradients = out, steps, bad_losses, bad_gradients
        self.turns = 1
        self.weights: list[torch.Tensor] = []

    def train_step(self, step: int, draws: Draws) -> dict[str, float]:
        loss = (self.model(draws.normal(8, 4)) - 1).square().mean()
        loss.backward()
        if step in self.bad_gradients:
            self.model.weight.grad[0, 0] = float("nan")
        value = float("inf") if step in self.bad_losses else loss.item()
        numbers = apply_gradients(self.opt, step, self.steps, 1.0, self.config, value)
        self.weights.append(self.model.weight.detach().clone())
        return {"loss": value, **numbers}

    def run(self) -> None:
        run("tiny", self.out, self.config, self.steps, {"model": self.model, "opt": self.opt}, self.train_step, 8, turns=self.turns)


def test_bad_losses_and_gradients_are_skipped_counted_and_shown(tmp_path, capsys):
    tiny = Tiny(tmp_path, 40, bad_losses=range(1, 20, 2), bad_gradients=range(21, 40, 2))
    tiny.run()
    for step in range(1, 40):
        assert torch.equal(tiny.weights[step], tiny.weights[step - 1]) == (step % 2 == 1)
    newest = torch.load(tmp_path / "tiny" / "checkpoints" / "step-0000040.pt", weights_only=True)
    assert newest["parts"]["tally"] == {"skipped": 20}
    assert "skipped=20" in capsys.readouterr().err


def test_the_count_of_skipped_steps_survives_a_stop(tmp_path):
    Tiny(tmp_path, 5, bad_losses=(1, 3)).run()
    Tiny(tmp_path, 9, bad_gradients=(6,)).run()
    assert torch.load(tmp_path / "tiny" / "checkpoints" / "step-0000009.pt", weights_only=True)["parts"]["tally"] == {"skipped": 3}


def test_ten_bad_losses_in_a_row_stop_the_run_with_good_weights(tmp_path):
    tiny = Tiny(tmp_path, 40, bad_losses=range(5, 40))
    with pytest.raises(FloatingPointError, match="10 steps in a row.*lower the learning rate"):
        tiny.run()
    assert torch.equal(tiny.weights[-1], tiny.weights[4])
    assert newest_step(tmp_path / "tiny" / "checkpoints") == 14


def test_ten_bad_steps_of_one_of_two_networks_stop_the_run(tmp_path):
    """A student whose every step fails while its discriminator, at odd steps, learns."""
    tiny = Tiny(tmp_path, 60, bad_losses=range(6, 60, 2))
    tiny.turns = 2
    with pytest.raises(FloatingPointError, match="10 steps in a row of network 1 of 2.*stopped at step 24"):
        tiny.run()
    rare = Tiny(tmp_path / "rare", 60, bad_losses=[s for s in range(0, 60, 2) if s % 18])  # the count begins anew with each good step of its own
    rare.turns = 2
    rare.run()
    assert len(rare.weights) == 60


def test_a_checkpoint_without_the_count_still_loads(tmp_path):
    tiny = Tiny(tmp_path, 6)
    save_checkpoint(tmp_path / "tiny" / "checkpoints", 4, {"model": tiny.model, "opt": tiny.opt})
    tiny.run()
    assert len(tiny.weights) == 2


def test_a_resumed_run_takes_the_new_learning_rate_and_refuses_another_optimiser(tmp_path):
    Tiny(tmp_path, 4).run()
    slower = Tiny(tmp_path, 8)
    slower.opt.param_groups[0]["peak"] = 0.0
    slower.run()
    assert len(slower.weights) == 4 and torch.equal(slower.weights[0], slower.weights[-1])
    other = Tiny(tmp_path, 12)
    other.opt = make_optimizer([(list(other.model.parameters()), 1e-2)], Config(optimizer="came"))
    with pytest.raises(ValueError, match="another one than Came"):
        other.run()


class Hungry(torch.nn.Module):
    """A network whose forward pass asks for more memory than there is."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return torch.zeros(2 ** 50).sum() + self.inner(**inputs)[0]


def test_out_of_memory_names_three_settings_with_numbers(tmp_path):
    from toy_stage import tiny_sana
    config = Config(preview_steps=0, tracker="none", precision="fp32")
    model = tiny_sana().float()
    net, opt = Hungry(model), adamw([(list(model.parameters()), 1e-3)], config)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        x = draws.normal(8, 4, 4, 4)
        net(hidden_states=x, encoder_hidden_states=draws.normal(8, 3, 12), timestep=draws.uniform(8), return_dict=False).mean().backward()
        return apply_gradients(opt, step, 3, 1.0, config)

    with pytest.raises(MemoryError) as caught:
        run("hungry", tmp_path, config, 3, {"model": net, "opt": opt, "ema": Ema(model, 0.9)}, train_step, 8)
    first, title, *helps = str(caught.value).splitlines()
    assert "out of memory at step 0" in first and "activations of one micro-batch about" in first
    assert [h.split("=")[0].strip() for h in helps] == ["micro_batches", "checkpointing", "optimizer"]
    assert "micro_batches=2 instead of 1" in helps[0] and all("GiB" in h for h in helps)


def test_the_trial_after_out_of_memory_steps_with_no_left_over_gradient(tmp_path):
    """The second micro-batch found no memory: the first one's gradients lie there, and the trial comes by the optimiser."""
    from toy_stage import tiny_sana
    config = Config(preview_steps=0, tracker="none", precision="fp32", micro_batches=2)
    net = tiny_sana().float()
    opt, before = adamw([(list(net.parameters()), 1e-2)], config), {name: w.clone() for name, w in net.state_dict().items()}
    asked = []

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        for part in draws.parts(2):
            x = part.normal(4, 4, 4, 4)
            net(hidden_states=x, encoder_hidden_states=part.normal(4, 3, 12), timestep=part.uniform(4), return_dict=False)[0].mean().backward()
            asked.append(part)
            if len(asked) == 2:
                assert next(net.parameters()).grad is not None
                raise torch.OutOfMemoryError("no more")
        return apply_gradients(opt, step, 3, 1.0, config)

    with pytest.raises(MemoryError, match="activations of one micro-batch about"):
        run("hungry", tmp_path, config, 3, {"model": net, "opt": opt}, train_step, 8)
    assert len(asked) >= 4 and not opt.state  # it was tried, and no memory taken for the optimiser
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
