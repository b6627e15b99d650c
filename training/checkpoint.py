"""Checkpoints that survive a kill at any moment: temp file, fsync, rename, the last two kept, a broken one skipped."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

log = logging.getLogger(__name__)
KEEP = 2


def write_atomic(path: Path, write) -> None:
    """`write(file)` into a temporary file beside `path`, then rename: `path` is the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(folder: Path, step: int, parts: dict) -> Path:
    """Writes the state of all `parts` (name -> object with state_dict) after `step` steps; keeps the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}.pt"
    state = {"step": step, "parts": {name: part.state_dict() for name, part in parts.items()}}
    write_atomic(path, lambda file: torch.save(state, file))
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, parts: dict) -> int:
    """Restores the newest readable checkpoint into `parts` and returns its step, or 0 when there is none.

    Raises ValueError when a checkpoint does not fit `parts` (another shape of model in the same folder).
    """
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step, states = state["step"], state["parts"]
        except Exception as error:  # truncated zip, bad pickle, missing key: fall back to the one before
            log.warning("%s cannot be read (%s); trying the one before", path, error)
            continue
        try:
            for name, part in parts.items():
                part.load_state_dict(states[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this configuration ({str(error)[:300]}); use another --out, or delete the folder") from error
        return step
    return 0
