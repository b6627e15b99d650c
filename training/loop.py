"""The training loop. It knows no loss: a stage hands it `train_step(step, rng) -> numbers`.

All randomness of step n comes from generators seeded by (seed, n), and the data order is a function of them: a run that
was killed and started again goes through the very same numbers as one that never stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import Config
from training.distributed import device, rank, world
from training.optim import adamw, apply_gradients, learning_rate  # noqa: F401  (stages take them from here)

MAX_BAD_STEPS = 10


def autocast(config: Config) -> torch.autocast:
    """Mixed precision of the run: weights stay fp32, the heavy operations run in bf16."""
    return torch.autocast(device().type, torch.bfloat16, enabled=config.precision == "bf16")


def maybe_compile(wanted: bool, function: Callable) -> Callable:
    """torch.compile where the recipe asks for it and the machine can."""
    if not wanted:
        return function
    if device().type == "cpu" and shutil.which("g++") is None:
        print("compile=True needs g++ on the CPU: running without it, about 3 times slower")
        return function
    # one program a shape: the stages feed few shapes, and symbolic ones fail in the convolutions of the CPU backend
    return torch.compile(function, dynamic=False)


class Draws:
    """Random numbers of one step, on the CPU and in a fixed order, whatever the device: Draws(seed, step).

    Process `rank` of `world` draws the numbers of the whole batch and keeps its slice, so that the batch is the same on any
    number of processes. Who uses `numpy` directly does the same: draw `count * world` rows, keep those of `mine(count)`.
    """

    def __init__(self, seed: int, step: int, rank: int = 0, world: int = 1):
        self.seed, self.step, self.rank, self.world = seed, step, rank, world
        self.numpy = np.random.default_rng((seed, step))
        self.torch = torch.Generator().manual_seed(int(self.numpy.integers(1 << 62)))

    def mine(self, count: int) -> slice:
        """The rows of the whole batch's `count * world` that this process works on."""
        return slice(self.rank * count, (self.rank + 1) * count)

    def normal(self, count: int, *shape: int) -> torch.Tensor:
        return torch.randn(count * self.world, *shape, generator=self.torch)[self.mine(count)].to(device())

    def uniform(self, count: int, *shape: int) -> torch.Tensor:
        return torch.rand(count * self.world, *shape, generator=self.torch)[self.mine(count)].to(device())

    def parts(self, count: int) -> list[Draws]:
        """Draws of the `count` micro-batches of this step: together they give the batch that one alone would."""
        return [Draws(self.seed, self.step, self.rank * count + i, self.world * count) for i in range(count)]


def local_batch(batch: int, config: Config) -> int:
    """Samples of one micro-batch on this process. ValueError where `batch` cannot be shared out evenly."""
    count = batch // (world() * config.micro_batches)
    if count * world() * config.micro_batches != batch:
        raise ValueError(f"a batch of {batch} cannot be shared evenly by {world()} processes with micro_batches={config.micro_batches}: "
                         "choose a batch that their product divides")
    return count


class Ema(torch.nn.Module):
    """Averaged copy of a module's weights. The decay is ramped up, so that the random start is soon forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = list(self.module.parameters()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def code_version() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def run(name: str, out: Path, config: Config, steps: int, parts: dict, train_step: Callable[[int, Draws], dict[str, float]],
        images_per_step: int, preview: Callable[[int, Path], dict[str, float]] | None = None, data_hash: str = "") -> None:
    """Runs `train_step` up to `steps`, resuming from what OUT/NAME holds.

    `parts` (name -> object with state_dict) is all that changes: weights, averages, optimisers.
    `preview(step, folder)` writes contact sheets and returns validation numbers.
    """
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    about = {"config": dataclasses.asdict(config), "code": code_version(), "data": data_hash}
    (folder / "run.json").write_text(json.dumps(about, indent=1))
    start = load_checkpoint(folder / "checkpoints", parts)
    if start >= steps:
        print(f"{name}: already at step {start} of {steps}")
        return
    board = SummaryWriter(str(out / "tensorboard" / name), purge_step=start)
    stop = []
    old_handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGTERM, signal.SIGINT)}
    saved, bad = time.monotonic(), 0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2, dynamic_ncols=True)
    try:
        for step in bar:
            tick = time.monotonic()
            numbers = train_step(step, Draws(config.seed, step, rank(), world()))
            numbers["images_per_s"] = images_per_step / (time.monotonic() - tick)
            bad = bad + 1 if numbers.get("skipped") else 0
            if bad >= MAX_BAD_STEPS:
                raise FloatingPointError(f"{name}: {bad} steps in a row without a finite gradient, stopped at step {step}. "
                                         f"The last good checkpoint is in {folder / 'checkpoints'}; lower the learning rate or use precision=fp32.")
            if step % 10 == 0:
                bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items() if k != "skipped"}, refresh=False)
                for key, value in numbers.items():
                    board.add_scalar(key, value, step)
            last = step + 1 == steps
            if stop or last or time.monotonic() - saved > config.save_minutes * 60:
                save_checkpoint(folder / "checkpoints", step + 1, parts)
                saved = time.monotonic()
            if preview is not None and (last or config.preview_steps and (step + 1) % config.preview_steps == 0):
                found = preview(step + 1, folder)
                for key, value in found.items():
                    board.add_scalar(f"val/{key}", value, step + 1)
                tqdm.write(f"{name} {step + 1}: " + "  ".join(f"{k} {v:.4g}" for k, v in {**numbers, **found}.items()))
            if stop:
                raise SystemExit(f"{name}: stopped at step {step + 1} of {steps}; run the same command to go on")
    finally:
        board.close()
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
