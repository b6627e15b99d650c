"""MJHQ-30K (playgroundai/MJHQ-30K): writes one picture a prompt in the layout of the reference, and compares with the reference.

    meta_data.json            {"ID": {"category": "animals", "prompt": "…"}, …}, 30,000 of them
    REFERENCE/animals/ID.jpg  mjhq30k_imgs.zip, unzipped
    FOLDER/animals/ID.png     what is written here

Published figures come from clean-fid (Playground) or pytorch-fid (SANA), which can be run on the two folders as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sana_app.model.folder import read_json
from training.data.cache import digest, once
from training.data.shards import PICTURES, decode_picture
from training.evaluation.distances import fid, kid
from training.evaluation.features import Features
from training.evaluation.layout import claim, save_picture
from training.evaluation.models import Model, picture_seed

BATCH = 8
PLAIN_NAME = r"[\w-][\w .-]*"  # ids and categories become file names


def read_metadata(path: Path, limit: int | None = None) -> dict[str, dict]:
    """ID -> {category, prompt}, in the file's order."""
    rows = {}
    for name, row in read_json(path).items():
        category, prompt = (row.get(key) if isinstance(row, dict) else None for key in ("category", "prompt"))
        if not isinstance(prompt, str) or not isinstance(category, str) or not all(re.fullmatch(PLAIN_NAME, word) for word in (name, category)):
            raise ValueError(f'{path}: {name[:60]!r} is not like "ID": {{"category": "animals", "prompt": "…"}} with plain names')
        rows[name] = {"category": category, "prompt": prompt}
    if not rows:
        raise ValueError(f"{path} names no pictures: wanted MJHQ-30K's meta_data.json")
    if limit is not None:  # evenly spread: the file may be sorted by category
        names = list(rows)
        rows = {names[i]: rows[names[i]] for i in np.unique(np.linspace(0, len(names) - 1, min(limit, len(names))).astype(int))}
    return rows


def write_pictures(model: Model, identity: dict, metadata: dict[str, dict], folder: Path, steps: int, seed: int, suffix: str = ".png") -> None:
    """Makes what is not there yet. Batches stay as they are whatever is there: a picture must not depend on where a run was stopped."""
    claim(folder, identity | {"benchmark": "mjhq", "steps": steps, "seed": seed, "suffix": suffix, "metadata": digest(*metadata)})
    names = list(metadata)
    for start in tqdm(range(0, len(names), BATCH), desc=f"MJHQ, {steps} steps", mininterval=5):
        part = names[start:start + BATCH]
        paths = [folder / metadata[name]["category"] / f"{name}{suffix}" for name in part]
        if all(path.exists() for path in paths):
            continue
        made = model.make([metadata[name]["prompt"] for name in part], [picture_seed(seed, "mjhq", name) for name in part], steps)
        for image, path in zip(made, paths):
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                save_picture(image, path)


def picture_paths(folder: Path, metadata: dict[str, dict]) -> list[Path]:
    """FOLDER/CATEGORY/ID.* of every row, in order. ValueError counts and names what is missing."""
    found, missing = [], []
    for name, row in metadata.items():
        path = next((p for ext in PICTURES if (p := folder / row["category"] / f"{name}{ext}").is_file()), None)
        found.append(path) if path else missing.append(f"{row['category']}/{name}")
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(metadata)} pictures, the first is {missing[0]}.jpg: wanted CATEGORY/ID.jpg")
    return found


def load(path: Path) -> np.ndarray:
    return decode_picture(path.read_bytes(), str(path))


def folder_features(paths: list[Path], features: Features, cache: Path | None = None) -> torch.Tensor:
    """Features [N, D] of picture files, a few in memory at a time; with `cache` they are kept (by names, sizes, times)."""
    def all_of_them() -> torch.Tensor:
        starts = tqdm(range(0, len(paths), BATCH), desc="features", mininterval=5)
        return torch.cat([features([load(path) for path in paths[i:i + BATCH]]) for i in starts])
    if cache is None:
        return all_of_them()
    key = digest(features.identity, *(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths))
    folder = once(cache / f"features-{key}", lambda new: np.save(new / "features.npy", all_of_them().numpy()))
    return torch.from_numpy(np.load(folder / "features.npy"))


def compare(made: torch.Tensor, reference: torch.Tensor, metadata: dict[str, dict], suffix: str) -> dict[str, float]:
    """FID and KID overall, FID per category of at least two pictures; rows of [N, D] twice are those of the metadata."""
    numbers = {f"mjhq_fid{suffix}": fid(reference, made), f"mjhq_kid{suffix}": kid(reference, made)}
    categories = np.array([row["category"] for row in metadata.values()])
    for category in sorted(set(categories)):
        rows = torch.from_numpy(np.flatnonzero(categories == category))
        if len(rows) > 1:
            numbers[f"mjhq_fid{suffix}_{category}"] = fid(reference[rows], made[rows])
    return numbers
