"""Latents of the pictures and conditions, computed once for an autoencoder, part by part, each named by the hash of its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.data.cache import Pixels, digest, once
from training.data.rows import Rows, joined

FIRST_LAYOUT_ROWS = 4096  # pictures a part, for caches of pixels that have no parts


@dataclass
class Latents:
    """Latents in unit scale (times the scaling factor): `images` [N, C, h, w] and `conds` [M, C, h, w], float16."""

    images: np.ndarray | Rows
    conds: np.ndarray | Rows


def _parts(pixels: Pixels) -> Iterator[tuple[slice, slice, str]]:
    """(pictures, inks, content hash) of each part."""
    if not pixels.parts:
        for a in range(0, len(pixels.images), FIRST_LAYOUT_ROWS):
            b = min(a + FIRST_LAYOUT_ROWS, len(pixels.images))
            rows, inks = slice(a, b), slice(int(pixels.first_ink[a]), int(pixels.first_ink[b]))
            yield rows, inks, digest(*(str(np.asarray(array).shape) + digest_bytes(array) for array in (pixels.images[rows], pixels.inks[inks])))
    row = ink = 0
    for count, inks, content in pixels.parts:
        yield slice(row, row + count), slice(ink, ink + inks), content
        row, ink = row + count, ink + inks


def digest_bytes(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:32]


@torch.no_grad()
def _encoded(source: np.ndarray, encode: Callable[[torch.Tensor], torch.Tensor], batch: int, bar: tqdm) -> np.ndarray:
    rows = []
    for start in range(0, len(source), batch):
        block = torch.from_numpy(np.array(source[start:start + batch])).float() / 127.5 - 1
        block = block.permute(0, 3, 1, 2) if block.ndim == 4 else block[:, None].expand(-1, 3, -1, -1)
        count = len(block)  # the last block is filled up, so that compiled code sees one shape
        block = torch.cat([block, block[-1:].expand(batch - count, -1, -1, -1)]).contiguous()
        rows.append(encode(block)[:count].float().cpu().numpy().astype(np.float16))
        bar.update(count)
    return np.concatenate(rows)


def latent_cache(pixels: Pixels, encode: Callable[[torch.Tensor], torch.Tensor], key: str, cache: Path, batch: int = 64,
                 first_key: str = "") -> Latents:
    """Latents of all pictures and drawings. `encode`: [B, 3, H, W] in [-1, 1] -> unit-scale latents; `key` names its weights,
    `first_key` those of a cache of the first layout, one array for all."""
    old = cache / f"latents-{digest(pixels.hash, first_key or key)}"
    if (old / "conds.npy").exists():
        return Latents(*(np.load(old / f"{name}.npy", mmap_mode="r") for name in ("images", "conds")))
    folder, found = cache / f"latents-{digest(key)}", []
    parts = [(rows, inks, content, (rows.stop - rows.start, inks.stop - inks.start)) for rows, inks, content in _parts(pixels)]
    missing = sum(sum(sizes) for _, _, content, sizes in parts if not (folder / content).exists())
    bar = tqdm(total=missing, desc="encoding", unit=" pictures", mininterval=5, leave=False, disable=not missing)
    for rows, inks, content, sizes in parts:

        def build(temporary: Path) -> None:
            np.save(temporary / "images.npy", _encoded(pixels.images[rows], encode, batch, bar))
            np.save(temporary / "conds.npy", _encoded(pixels.inks[inks], encode, batch, bar))
        found.append((once(folder / content, build), sizes))
    bar.close()
    return Latents(*(Rows([(path / f"{name}.npy", size[i]) for path, size in found]) for i, name in enumerate(("images", "conds"))))


def join_latents(sets: list[Latents]) -> Latents:
    """Latents of one shape from several data sets, one after the other."""
    return Latents(joined([s.images for s in sets]), joined([s.conds for s in sets]))
