"""Decoded data on disk, memory-mapped: pixels once a data set, latents once an autoencoder, text once an encoder.

Each cache lies in a folder named by the hash of all that went into it, and is renamed into place when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from sana_app.lines import resize_ink
from training.data.drawing import line_drawing
from training.data.shards import Sample, read_samples

# (sample, its fitted picture, fit: crops and resizes another raster of the sample as the picture was) -> condition rasters
Conditions = Callable[[Sample, np.ndarray, Callable[[np.ndarray], np.ndarray]], list[np.ndarray]]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def source_hash(source: Path, split: str) -> str:
    """Hash of a data folder: its manifest where it has one, else names, sizes and times of its files."""
    manifest = source / "manifest.json"
    if manifest.exists():
        return digest(manifest.read_text(), split)
    if not source.is_dir():
        raise ValueError(f"no data at {source}: wanted a folder with NAME.png + NAME.txt pairs or *.tar shards")
    files = sorted(p for p in source.rglob("*") if p.is_file())
    return digest(split, *(f"{p.relative_to(source)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files))


def once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, built by `build(temporary folder)` if it is not there yet."""
    if not folder.exists():
        temporary = folder.with_name(folder.name + ".incomplete")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        build(temporary)
        os.replace(temporary, folder)
    return folder


@dataclass
class Pixels:
    """One split in memory-mapped arrays. Inks of picture i are rows `first_ink[i] : first_ink[i + 1]` of `inks`."""

    images: np.ndarray     # uint8 [N, S, S, 3]
    inks: np.ndarray       # conditions: ink uint8 [M, S, S], 255 = ink (or depth, 255 = near), or pictures in colour uint8 [M, S, S, 3]
    first_ink: np.ndarray  # int64 [N + 1]
    captions: list[list[str]]
    meta: list[dict]
    hash: str


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop to a square, then resize to `size` px."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    image = image[top:top + side, left:left + side]
    if side == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)


def _build_pixels(folder: Path, source: Path, split: str, size: int, conditions: Conditions | None) -> None:
    images, inks, first, captions, meta, keys = [], [], [0], [], [], []
    for sample in tqdm(read_samples(source, split), desc=f"reading {split}", mininterval=5):
        image = fit(sample.image, size)
        if conditions is None:
            drawings = sample.lines or [_draw(sample.image, sample.key, i) for i in range(2)]
            inks += [resize_ink(fit(ink, min(ink.shape)), size) for ink in drawings]
        else:
            inks += conditions(sample, image, lambda raster: fit(raster, size))
        images.append(image)
        first.append(len(inks))
        captions.append(sample.captions)
        meta.append(sample.meta)
        keys.append(sample.key)
    np.save(folder / "images.npy", np.stack(images))
    np.save(folder / "inks.npy", np.stack(inks))
    np.save(folder / "first_ink.npy", np.array(first))
    (folder / "about.json").write_text(json.dumps({"captions": captions, "meta": meta, "keys": keys}))


def _draw(image: np.ndarray, key: str, number: int) -> np.ndarray:
    """A drawing for a picture that came without one. Its silhouette is what differs from the border's colour."""
    paper = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    alpha = np.where(np.abs(image.astype(np.float32) - paper).max(-1) > 24, 255, 0).astype(np.uint8)
    rng = np.random.default_rng(int(digest(key, str(number)), 16))
    return line_drawing(np.ascontiguousarray(image), alpha, rng)


def pixel_cache(source: str | Path, split: str, size: int, cache: Path, condition: str = "lines", conditions: Conditions | None = None) -> Pixels:
    """All pictures of a split at `size` px, and their conditions: line drawings, or what `conditions` makes (training/conditions.py)."""
    source = Path(source)
    key = digest(source_hash(source, split), str(size), "pixels-2", *([] if condition == "lines" else [condition]))
    folder = once(cache / f"pixels-{split}-{key}", lambda f: _build_pixels(f, source, split, size, conditions))
    about = json.loads((folder / "about.json").read_text())
    load = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
    return Pixels(load("images"), load("inks"), np.load(folder / "first_ink.npy"), about["captions"], about["meta"], key)


@dataclass
class Latents:
    """Latents in unit scale (times the scaling factor): `images` [N, C, h, w] and `conds` [M, C, h, w], float16."""

    images: np.ndarray
    conds: np.ndarray


@torch.no_grad()
def latent_cache(pixels: Pixels, encode: Callable[[torch.Tensor], torch.Tensor], key: str, cache: Path, batch: int = 64) -> Latents:
    """Latents of all pictures and drawings. `encode`: [B, 3, S, S] in [-1, 1] -> unit-scale latents; `key` names its weights."""
    def build(folder: Path) -> None:
        for name, source in (("images", pixels.images), ("conds", pixels.inks)):
            rows = []
            for start in tqdm(range(0, len(source), batch), desc=f"encoding {name}", mininterval=5):
                block = torch.from_numpy(np.asarray(source[start:start + batch])).float() / 127.5 - 1
                block = block.permute(0, 3, 1, 2) if block.ndim == 4 else block[:, None].expand(-1, 3, -1, -1)
                count = len(block)  # the last block is filled up, so that compiled code sees one shape
                block = torch.cat([block, block[-1:].expand(batch - count, -1, -1, -1)]).contiguous()
                rows.append(encode(block)[:count].float().cpu().numpy().astype(np.float16))
            np.save(folder / f"{name}.npy", np.concatenate(rows))
    folder = once(cache / f"latents-{digest(pixels.hash, key)}", build)
    return Latents(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "conds")))


@dataclass
class Texts:
    """Token states of every distinct caption, without padding: caption j is rows `first[j] : first[j + 1]` of `states`."""

    states: np.ndarray  # float16 [T, C]
    first: np.ndarray   # int64 [K + 1]
    index: dict[str, int]

    def batch(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions -> (embeddings [B, L, C] float32, mask [B, L] float32); L is that of the longest of all captions,
        so that compiled code sees one shape."""
        spans = [(self.first[self.index[c]], self.first[self.index[c] + 1]) for c in captions]
        longest = int(np.diff(self.first).max())
        states = torch.zeros(len(captions), longest, self.states.shape[1])
        mask = torch.zeros(len(captions), longest)
        for row, (a, b) in enumerate(spans):
            states[row, :b - a] = torch.from_numpy(self.states[a:b].astype(np.float32))
            mask[row, :b - a] = 1
        return states, mask


@torch.no_grad()
def text_cache(captions: list[str], encode: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]], key: str, cache: Path, batch: int = 256) -> Texts:
    """Token states of all distinct captions. `encode`: prompts -> (embeddings [B, L, C], mask [B, L])."""
    distinct = sorted(set(captions), key=lambda c: (len(c), c))

    def build(folder: Path) -> None:
        states, first = [], [0]
        for start in tqdm(range(0, len(distinct), batch), desc="encoding captions", mininterval=5):
            embeddings, mask = encode(distinct[start:start + batch])
            for row, keep in zip(embeddings.float().cpu().numpy(), mask.cpu().numpy() > 0):
                states.append(row[keep].astype(np.float16))
                first.append(first[-1] + int(keep.sum()))
        np.save(folder / "states.npy", np.concatenate(states))
        np.save(folder / "first.npy", np.array(first))
    folder = once(cache / f"texts-{digest(key, *distinct)}", build)
    return Texts(np.load(folder / "states.npy", mmap_mode="r"), np.load(folder / "first.npy"), {c: i for i, c in enumerate(distinct)})
