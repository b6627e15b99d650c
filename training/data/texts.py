"""Token states of the captions, computed once for a text encoder: a store that only grows, part by part, each caption in it once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.data.cache import digest, once
from training.data.rows import Rows

PART_BYTES = 256 * 2 ** 20  # token states of a part


@dataclass
class Texts:
    """Token states of captions, without padding: those of caption c are rows `spans[c][0] : spans[c][1]` of `states`."""

    states: np.ndarray | Rows  # float16 [T, C]
    spans: dict[str, tuple[int, int]]

    def __post_init__(self):
        self.longest = max(b - a for a, b in self.spans.values())

    def batch(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions -> (embeddings [B, L, C] float32, mask [B, L] float32); L is that of the longest of all captions,
        so that compiled code sees one shape."""
        states = torch.zeros(len(captions), self.longest, self.states.shape[1])
        mask = torch.zeros(len(captions), self.longest)
        for row, (a, b) in enumerate(self.spans[c] for c in captions):
            states[row, :b - a] = torch.from_numpy(self.states[a:b].astype(np.float32))
            mask[row, :b - a] = 1
        return states, mask


@lru_cache(maxsize=8)
def folder_hash(folder: Path) -> str:
    """Content hash of all files in a folder."""
    h = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        h.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                h.update(block)
    return h.hexdigest()[:16]


def _blocks(captions: list[str], encode: Callable, batch: int) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Captions and their states, about PART_BYTES of them at a time."""
    names, states, size = [], [], 0
    for start in tqdm(range(0, len(captions), batch), desc="encoding captions", mininterval=5, disable=not captions):
        embeddings, mask = encode(captions[start:start + batch])
        names += captions[start:start + batch]
        for row, keep in zip(embeddings.float().cpu().numpy(), mask.cpu().numpy() > 0):
            states.append(row[keep].astype(np.float16))
            size += states[-1].nbytes
        if size >= PART_BYTES:
            yield names, states
            names, states, size = [], [], 0
    if names:
        yield names, states


@torch.no_grad()
def text_cache(captions: list[str], encode: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]], key: str, cache: Path, batch: int = 256,
               first_key: str = "") -> Texts:
    """Token states of all distinct captions. `encode`: prompts -> (embeddings [B, L, C], mask [B, L]); `key` names its weights,
    `first_key` those of a cache of the first layout, which held one data set's captions in one array."""
    distinct = sorted(set(captions), key=lambda c: (len(c), c))
    old = cache / f"texts-{digest(first_key or key, *distinct)}"
    if (old / "first.npy").exists():
        ends = np.load(old / "first.npy")
        return Texts(np.load(old / "states.npy", mmap_mode="r"), {c: (int(a), int(b)) for c, a, b in zip(distinct, ends, ends[1:])})
    folder, wanted = cache / f"texts-{digest(key)}", set(distinct)
    spans: dict[str, tuple[int, int]] = {}
    parts: list[tuple[Path, int]] = []

    def take(part: Path) -> None:
        """Adds a part to the array, if it holds any of the wanted captions."""
        begin = sum(count for _, count in parts)
        names, ends = json.loads((part / "captions.json").read_text()), np.load(part / "first.npy")
        found = {c: (begin + int(a), begin + int(b)) for c, a, b in zip(names, ends, ends[1:]) if c in wanted}
        if found:
            spans.update(found)
            parts.append((part / "states.npy", int(ends[-1])))

    for part in sorted(p for p in folder.glob("part-*") if p.suffix != ".incomplete"):
        take(part)
    for names, states in _blocks([c for c in distinct if c not in spans], encode, batch):
        def build(temporary: Path) -> None:
            np.save(temporary / "states.npy", np.concatenate(states))
            np.save(temporary / "first.npy", np.cumsum([0, *(len(s) for s in states)]))
            (temporary / "captions.json").write_text(json.dumps(names))
        take(once(folder / f"part-{digest(*names)}", build))
    return Texts(Rows(parts), spans)
