"""Checkpoints that survive a kill at any moment: temp file, fsync, rename, the last two kept, a broken one skipped.

The main process writes, and writes whole tensors: any number of processes, with or without FSDP2, reads them. Beside each lies its
SHA-256 (`sha256sum -c` reads it too), so that a flipped bit is noticed; beside all of them run.json, what the run was started with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch

from training.config import Config
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


def hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


class Hashing:
    """A file that is hashed as it is written: 100 MB take 0.06 s, a quarter of saving them."""

    def __init__(self, file):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, step: int, parts: dict) -> Path:
    """Writes the state of all `parts` (name -> object with state_dict) after `step` steps; keeps the last two.

    Every process must call it. OSError says what is left when the disk is full.
    """
    path = folder / f"step-{step:07d}.pt"
    state = {"step": step, "parts": {name: whole(part.state_dict()) if is_sharded(part) else part.state_dict() for name, part in parts.items()}}

    def write(file) -> None:
        hashing = Hashing(file)
        torch.save(state, hashing)
        # before the checkpoint has its name: a kill in between leaves a hash without a checkpoint, never a new one without its hash
        write_atomic(hash_file(path), lambda file: file.write(f"{hashing.hash.hexdigest()}  {path.name}\n".encode()))

    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomic(path, write)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns the file's OSError into a RuntimeError
            good = sorted(folder.glob("step-*.pt"))
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}; {shutil.disk_usage(folder).free / 2**30:.1f} GiB free). "
                          f"The last good checkpoint is {good[-1] if good else 'none'}; free some space and run the same command to go on") from error
        for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
            old.unlink()
        for alone in folder.glob("step-*.pt.sha256"):
            if not alone.with_suffix("").exists():
                alone.unlink()
    barrier()
    return path


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by its name, or 0."""
    return max((int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt")), default=0)


def check_hash(path: Path) -> None:
    """ValueError when `path` is not what was written. One that has no hash comes from before there were any."""
    if not hash_file(path).exists():
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if hash_file(path).read_text().split()[:1] != [found]:
        raise ValueError(f"its SHA-256 is {found}, {hash_file(path).name} says another: damaged since it was written, or another file")


def load_checkpoint(folder: Path, parts: dict, optional: tuple[str, ...] = ()) -> int:
    """Restores the newest readable checkpoint into `parts` and returns its step, or 0 when there is none.

    Parts named in `optional` may be missing in it. Raises ValueError when a checkpoint does not fit `parts` (another shape of
    model in the same folder).
    """
    for leftover in folder.glob("*.tmp") if is_main() else ():
        leftover.unlink()
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            check_hash(path)
            # several processes of a machine share one mapping of the file
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=world() > 1)
            step, states = state["step"], state["parts"]
        except Exception as error:  # flipped bit, truncated zip, bad pickle, missing key: fall back to the one before
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


def record_start(folder: Path, about: dict, step: int) -> None:
    """Writes `about` (config, code, data, processes) of a run that starts at `step` into FOLDER/run.json, those of earlier starts, as far
    as they differ, under "earlier". Every process must call it, before it waits for another.

    A run that goes on names the settings that changed. ValueError when seed or data did: its numbers would be those of neither run.
    """
    path, about = folder / "run.json", {**json.loads(json.dumps(about)), "step": step}  # tuples as json has them
    try:
        old = json.loads(path.read_text())
    except FileNotFoundError:
        old = {}
    except ValueError as error:
        log.warning("%s cannot be read (%s): not compared with the settings of this start", path, error)
        old = {}
    earlier = old.pop("earlier", [])
    if step and old:
        _refuse_another_run(path, old, about)
        changed = changed_settings(old, about)
        if changed and is_main():
            print(f"{folder.name}: goes on from step {step} with other settings: {', '.join(changed)}")
    if old and {**old, "step": step} == about:
        about["step"] = old.get("step", 0)  # the same once more: many short starts are one line of the history
    elif old:
        earlier = [*earlier, old]
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(json.dumps({**about, "earlier": earlier}, indent=1).encode()))


def _refuse_another_run(path: Path, old: dict, new: dict) -> None:
    seeds, hashes = [a.get("config", {}).get("seed") for a in (old, new)], [a.get("data") for a in (old, new)]
    what = [f"seed={seeds[0]}, now {seeds[1]}"] * (seeds[0] is not None and seeds[0] != seeds[1])
    if all(hashes) and hashes[0] != hashes[1]:
        names = [a.get("config", {}).get("data", "") for a in (old, new)]
        what.append(f"data {names[0]} (hash {hashes[0]}), now {names[1]} (hash {hashes[1]}, of the files' names, sizes and times and of how they are read)")
    if what:
        raise ValueError(f"{path.parent} was begun with {' and '.join(what)}: use another --out, or delete that folder. To go on in spite of it, delete {path}")


def changed_settings(old: dict, new: dict) -> list[str]:
    """'name old -> new' of each setting of two starts that differs. What an older version did not know had its default."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    pairs = [(key, old.get("config", {}).get(key, defaults.get(key)), value) for key, value in new["config"].items()]
    pairs.append(("processes", old.get("processes", 1), new["processes"]))
    return [f"{key} {was} -> {now}" for key, was, now in pairs if was != now and key != "dry_run"]
