"""Checkpoints that survive a kill at any moment: temp file, fsync, rename, the last two kept, a broken one skipped.

The main process writes, and writes whole tensors: any number of processes, with or without FSDP2, reads them.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch

from training.distributed import barrier, is_main, is_sharded, load_whole, whole, world

log = logging.getLogger(__name__)
KEEP = 2


def write_atomic(path: Path, write) -> None:
    """`write(file)` into a temporary file beside `path`, then rename: `path` is the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file would only fill a full disk further
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name too
    os.close(folder)


def save_checkpoint(folder: Path, step: int, parts: dict) -> Path:
    """Writes the state of all `parts` (name -> object with state_dict) after `step` steps; keeps the last two.

    Every process must call it. OSError says what is left when the disk is full.
    """
    path = folder / f"step-{step:07d}.pt"
    state = {"step": step, "parts": {name: whole(part.state_dict()) if is_sharded(part) else part.state_dict() for name, part in parts.items()}}
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomic(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns the file's OSError into a RuntimeError
            good = sorted(folder.glob("step-*.pt"))
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}; {shutil.disk_usage(folder).free / 2**30:.1f} GiB free). "
                          f"The last good checkpoint is {good[-1] if good else 'none'}; free some space and run the same command to go on") from error
        for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
            old.unlink()
    barrier()
    return path


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by its name, or 0."""
    return max((int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt")), default=0)


def load_checkpoint(folder: Path, parts: dict, optional: tuple[str, ...] = ()) -> int:
    """Restores the newest readable checkpoint into `parts` and returns its step, or 0 when there is none.

    Parts named in `optional` may be missing in it. Raises ValueError when a checkpoint does not fit `parts` (another shape of
    model in the same folder).
    """
    for leftover in folder.glob("*.tmp") if is_main() else ():
        leftover.unlink()
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            # several processes of a machine share one mapping of the file
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=world() > 1)
            step, states = state["step"], state["parts"]
        except Exception as error:  # truncated zip, bad pickle, missing key: fall back to the one before
            log.warning("%s cannot be read (%s); trying the one before", path, error)
            continue
        try:
            for name, part in parts.items():
                if name in states or name not in optional:
                    load_whole(part, states[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this configuration ({str(error)[:300]}); use another --out, or delete the folder") from error
        return step
    return 0
