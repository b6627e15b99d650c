"""Curves of a run, through accelerate: TensorBoard, or whatever tracker it knows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from training.config import Config

NONE = "none"


def open_tracker(name: str, out: Path, config: Config, start: int) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    """(log(numbers, step), close()) for stage `name`, which goes on at step `start`. Only the main process writes.

    ValueError names an unknown tracker, or one whose package is missing.
    """
    if config.tracker == NONE:
        return lambda numbers, step: None, lambda: None
    try:
        accelerator = Accelerator(log_with=config.tracker, project_dir=out / "tensorboard")
    except ValueError as error:
        raise ValueError(f"tracker={config.tracker!r}: {error}; or {NONE!r}") from error
    if not accelerator.log_with:
        raise ValueError(f"tracker={config.tracker}: its package is not installed: pip install {config.tracker}, or take tracker=tensorboard")
    # a resumed run goes on in the same curves
    again = hashlib.sha256(f"{out.resolve()} {name}".encode()).hexdigest()[:16]
    settings = {"tensorboard": {"purge_step": start}, "wandb": {"name": f"{out.name}/{name}", "id": again, "resume": "allow"}}
    accelerator.init_trackers(name if config.tracker == "tensorboard" else "sana-sketch", init_kwargs=settings)

    def close() -> None:  # not accelerator.end_training, which would end the process group too: more stages may follow
        for tracker in accelerator.trackers:
            tracker.finish()
    return lambda numbers, step: accelerator.log(numbers, step=step), close
