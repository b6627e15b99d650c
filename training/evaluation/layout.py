"""What both benchmark runners need: an output folder that belongs to one run, and pictures that are written whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sana_app.model.folder import read_json
from training.checkpoint import write_atomic

RUN_FILE = "run.json"


def claim(folder: Path, identity: dict) -> None:
    """Makes `folder` that of one run: `identity` says all that its pictures depend on. Going on with another one is a ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN_FILE
    if not path.exists():
        if any(p.suffix != ".tmp" for p in folder.iterdir()):  # a run stopped at its very start leaves a .tmp
            raise ValueError(f"{folder} holds files, but no {RUN_FILE} that says what made them: use an empty or another --out")
        write_atomic(path, lambda file: file.write((json.dumps(identity, indent=1) + "\n").encode()))
    differs = [f"{key} {read_json(path).get(key)!r} (now {value!r})" for key, value in identity.items() if read_json(path).get(key) != value]
    if differs:
        raise ValueError(f"{folder} was begun with {', '.join(differs)}: use another --out, or delete the folder")


def save_picture(image: np.ndarray, path: Path) -> None:
    """uint8 [H, W, 3] -> .png, or .jpg of quality 95; the file is whole or not there."""
    kind = {".png": dict(format="PNG"), ".jpg": dict(format="JPEG", quality=95, subsampling=0)}[path.suffix]
    write_atomic(path, lambda file: Image.fromarray(image).save(file, **kind))


def read_jsonl(path: Path, wanted: dict[str, type]) -> Iterator[dict]:
    """The objects of a JSON-lines file; each must have the wanted keys in the wanted types. ValueError names the line."""
    if not path.is_file():
        raise ValueError(f"no file {path}: wanted JSON lines with {', '.join(wanted)}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from error
        for key, kind in wanted.items():
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                raise ValueError(f"{path}, line {number}: wanted {key!r} of type {kind.__name__}, got {line[:80]}")
        yield row
