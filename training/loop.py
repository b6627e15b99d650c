"""The training loop. It knows no loss: a stage hands it `train_step(step, rng) -> numbers`.

All randomness of step n comes from generators seeded by (seed, n), and the data order is a function of them: a run that
was killed and started again goes through the very same numbers as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.checkpoint import load_checkpoint, newest_step, record_start, save_checkpoint
from training.config import Config
from training.distributed import agreed, barrier, copy_from_main, device, is_main, is_sharded, mean_numbers, rank, world
from training.dry_run import look
from training.memory import is_out_of_memory, out_of_memory_message, peak_gib
from training.tracker import open_tracker

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


class SharedDraws:
    """The torch draws of one step's micro-batches: the whole batch's numbers, drawn once and not once a micro-batch, of which there may
    be 64. Kept are the rows that the `count` micro-batches of this process have yet to read; each is handed out once.
    """

    def __init__(self, first: Draws, count: int):
        self.first, self.count = first, count                    # the draws of this process's first micro-batch, whose generator draws for all
        self.asked: list[tuple] = []                             # what was drawn: function, rows a micro-batch, shape
        self.waiting: dict[tuple[int, int], torch.Tensor] = {}   # (number of the draw, micro-batch) -> its rows

    def take(self, part: int, number: int, function: Callable, rows: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The rows of micro-batch `part` of draw `number`, which the first that comes to it makes."""
        if number == len(self.asked):
            self.asked.append((function, rows, shape))
            whole = function(rows * self.first.world, *shape, generator=self.first.torch)
            own = whole[self.first.mine(rows).start:][:rows * self.count]
            self.waiting |= {(number, i): piece.clone() for i, piece in enumerate(own.split(rows))}  # clones: a view would keep the whole
        assert self.asked[number] == (function, rows, shape), f"micro-batches of a step draw alike, not {shape} after {self.asked[number][2]}"
        return self.waiting.pop((number, part))


class Draws:
    """Random numbers of one step, on the CPU and in a fixed order, whatever the device: Draws(seed, step).

    Process `rank` of `world` draws the numbers of the whole batch and keeps its slice, so that the batch is the same on any
    number of processes. Who uses `numpy` directly does the same: draw `count * world` rows, keep those of `mine(count)`.
    """

    def __init__(self, seed: int, step: int, rank: int = 0, world: int = 1):
        self.seed, self.step, self.rank, self.world = seed, step, rank, world
        self.numpy = np.random.default_rng((seed, step))
        self.torch = torch.Generator().manual_seed(int(self.numpy.integers(1 << 62)))
        self.shared: SharedDraws | None = None
        self.number = 0  # of draws taken from `shared`

    def mine(self, count: int) -> slice:
        """The rows of the whole batch's `count * world` that this process works on."""
        return slice(self.rank * count, (self.rank + 1) * count)

    def normal(self, count: int, *shape: int) -> torch.Tensor:
        return self._draw(torch.randn, count, shape)

    def uniform(self, count: int, *shape: int) -> torch.Tensor:
        return self._draw(torch.rand, count, shape)

    def _draw(self, function: Callable, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        if self.shared is None:
            return function(count * self.world, *shape, generator=self.torch)[self.mine(count)].to(device())
        self.number += 1
        return self.shared.take(self.rank - self.shared.first.rank, self.number - 1, function, count, shape).to(device())

    def parts(self, count: int) -> list[Draws]:
        """Draws of the `count` micro-batches of this step: together they give the batch that one alone would."""
        found = [Draws(self.seed, self.step, self.rank * count + i, self.world * count) for i in range(count)]
        if count > 1:
            shared = SharedDraws(found[0], count)
            for draws in found:
                draws.shared = shared
        return found


def local_batch(batch: int, config: Config) -> int:
    """Samples of one micro-batch on this process. ValueError where `batch` cannot be shared out evenly."""
    count = batch // (world() * config.micro_batches)
    if count * world() * config.micro_batches != batch:
        raise ValueError(f"a batch of {batch} cannot be shared evenly by {world()} processes with micro_batches={config.micro_batches}: "
                         "choose a batch that their product divides")
    return count


def code_version() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


class Tally:
    """Counts of a run that go into its checkpoints."""

    def __init__(self):
        self.skipped = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]


def run(name: str, out: Path, config: Config, steps: int, parts: dict, train_step: Callable[[int, Draws], dict[str, float]],
        images_per_step: int, preview: Callable[[int, Path], dict[str, float]] | None = None, data_hash: str = "", turns: int = 1) -> None:
    """Runs `train_step` up to `steps`, resuming from what OUT/NAME holds. A dry run looks at one step and raises `Looked`.

    `parts` (name -> object with state_dict) is all that changes: weights, averages, optimisers.
    `preview(step, folder)` writes contact sheets and returns validation numbers; it runs in the main process, and with FSDP2 in
    all of them, the others with a folder that is thrown away.
    `images_per_step` counts those of all processes. `data_hash`: a run that was begun on other data is not gone on with.
    `turns`: networks that are trained in turn, step by step. Bad steps in a row are counted for each: a student whose every step is
    bad must not go on for ever because its discriminator's are good.
    """
    if config.dry_run:
        look(name, out, config, steps, parts, train_step, Draws(config.seed, 0, rank(), world()), images_per_step)
    folder, tally = out / name, Tally()
    about = {"config": dataclasses.asdict(config), "code": code_version(), "data": data_hash, "processes": world()}
    record_start(folder, about, newest_step(folder / "checkpoints"))
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            copy_from_main(part)
    parts = {**parts, "tally": tally}
    start = load_checkpoint(folder / "checkpoints", parts, optional=("tally",))
    if agreed(mean_numbers({"start": start})["start"] != start):
        raise ValueError(f"{name}: the processes found different checkpoints (this one's: step {start}): --out must lie on a file system that all of them see")
    if start >= steps:
        if is_main():
            print(f"{name}: already at step {start} of {steps}")
        return
    log, close = open_tracker(name, out, config, start)
    stop: list[bool] = []
    old_handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGTERM, signal.SIGINT)}
    saved, bad, shown = time.monotonic(), [0] * turns, {}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2, dynamic_ncols=True, disable=not is_main())
    step = start
    try:
        for step in bar:
            tick = time.monotonic()
            numbers = train_step(step, Draws(config.seed, step, rank(), world()))
            numbers["images_per_s"] = images_per_step / (time.monotonic() - tick)
            is_bad = bool(numbers.get("skipped")) or not all(map(math.isfinite, numbers.values()))
            turn = step % turns
            bad[turn], tally.skipped = bad[turn] + 1 if is_bad else 0, tally.skipped + is_bad
            if bad[turn] >= MAX_BAD_STEPS:
                whose = f" of network {turn + 1} of {turns}, which take turns," if turns > 1 else ""
                raise FloatingPointError(f"{name}: {bad[turn]} steps in a row{whose} without a finite loss and gradient, stopped at step {step} ({tally.skipped} skipped in all). "
                                         f"The last good checkpoint is in {folder / 'checkpoints'}; lower the learning rate or use precision=fp32.")
            last = step + 1 == steps
            if step % 10 < 2 or last:  # two in a row: a student and its discriminator take turns
                shown |= mean_numbers(numbers | {"skipped": float(tally.skipped), "peak_gib": peak_gib()})
                bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
                log(shown, step)
            # one question a step, so that all processes stop, and save, at the same one
            save = last or agreed(bool(stop) or is_main() and time.monotonic() - saved > config.save_minutes * 60)
            if save:
                save_checkpoint(folder / "checkpoints", step + 1, parts)
                saved = time.monotonic()
            if preview is not None and (last or config.preview_steps and (step + 1) % config.preview_steps == 0):
                found = show(preview, step + 1, folder, parts)
                log({f"val/{key}": value for key, value in found.items()}, step + 1)
                if is_main():
                    tqdm.write(f"{name} {step + 1}: " + "  ".join(f"{k} {v:.4g}" for k, v in {**shown, **found}.items()))
            if save and agreed(bool(stop)):
                raise SystemExit(f"{name}: stopped at step {step + 1} of {steps}; run the same command to go on")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        bar.close()
        raise MemoryError(out_of_memory_message(name, config, images_per_step, parts, train_step, step, Draws(config.seed, step, rank(), world()))) from error
    finally:
        close()
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def show(preview: Callable[[int, Path], dict[str, float]], step: int, folder: Path, parts: dict) -> dict[str, float]:
    """The validation numbers of `preview`: from the main process, which alone writes into `folder`."""
    found: dict[str, float] = {}
    if is_main():
        found = preview(step, folder)
    elif any(is_sharded(part) for part in parts.values()):  # a sharded network runs in all processes or in none
        with tempfile.TemporaryDirectory() as scratch:
            preview(step, Path(scratch))
    barrier()
    return found
