"""Paired samples on disk: webdataset tar shards, or a plain folder of pictures and text files.

A sample is `KEY.png` (or .jpg, .webp) with `KEY.txt` or `KEY.json`, and any number of `KEY.lines*.png`
(dark lines on light paper or the reverse) or `KEY.cond*.png` (a condition picture of your own kind, taken as it is, in
colour). A broken file is named, skipped and counted.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from sana_app.lines import ink_from_rgb

log = logging.getLogger(__name__)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class Sample:
    """One pair. `image` uint8 [H, W, 3]; `lines` a list of ink rasters uint8 [H, W] (255 = ink), `conds` one of the user's own
    condition pictures uint8 [H, W, 3]; both possibly empty."""

    key: str
    image: np.ndarray
    lines: list[np.ndarray]
    captions: list[str]
    meta: dict = field(default_factory=dict)
    conds: list[np.ndarray] = field(default_factory=list)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W] or RGB [H, W, 3] -> PNG bytes."""
    ok, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    assert ok
    return data.tobytes()


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """Picture bytes -> RGB uint8 [H, W, 3] over white. ValueError names the file."""
    raw = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None or raw.dtype != np.uint8:
        raise ValueError(f"{name}: not an 8-bit picture that can be read; wanted PNG, JPEG or WebP")
    if raw.ndim == 2:
        return np.repeat(raw[..., None], 3, 2)
    rgb = raw[..., 2::-1]
    if raw.shape[2] == 4:
        alpha = raw[..., 3:].astype(np.float32) / 255
        rgb = np.round(rgb * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(rgb)


def sample_files(sample: Sample) -> list[tuple[str, bytes]]:
    """The files of one sample, as they stand in a shard: lines are stored dark on light, as a person would see them."""
    files = [(f"{sample.key}.png", encode_png(sample.image))]
    files += [(f"{sample.key}.lines{i}.png", encode_png(255 - ink)) for i, ink in enumerate(sample.lines)]
    files += [(f"{sample.key}.cond{i}.png", encode_png(cond)) for i, cond in enumerate(sample.conds)]
    text = json.dumps({"captions": sample.captions, **sample.meta}, sort_keys=True, ensure_ascii=False)
    return files + [(f"{sample.key}.json", text.encode())]


class ShardWriter:
    """Writes samples to PREFIX-00000.tar, … with `per_shard` samples each; the same samples give the same bytes."""

    def __init__(self, folder: Path, prefix: str, per_shard: int = 2000):
        self.folder, self.prefix, self.per_shard = Path(folder), prefix, per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count, self.paths, self.tar = 0, [], None

    def write(self, sample: Sample) -> None:
        if self.count % self.per_shard == 0:
            self.close()
            self.paths.append(self.folder / f"{self.prefix}-{len(self.paths):05d}.tar")
            self.tar = tarfile.open(self.paths[-1], "w", format=tarfile.USTAR_FORMAT)
        for name, data in sample_files(sample):
            info = tarfile.TarInfo(name)  # mtime, owner stay 0: deterministic bytes
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
        self.count += 1

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.tar = None


def build_sample(key: str, files: dict[str, bytes]) -> Sample:
    """Files of one key (extension -> bytes) -> Sample. ValueError names what is missing or broken."""
    picture = next((ext for ext in PICTURES if ext in files), None)
    if picture is None:
        raise ValueError(f"{key}: no picture; wanted one of {', '.join(key + e for e in PICTURES)}")
    meta: dict = {}
    if ".json" in files:
        meta = json.loads(files[".json"])
        captions = list(meta.pop("captions", [])) or [str(meta.pop("caption", ""))]
    elif ".txt" in files:
        captions = [line.strip() for line in files[".txt"].decode("utf-8", "replace").splitlines() if line.strip()] or [""]
    else:
        raise ValueError(f"{key}: no caption; wanted {key}.txt (one caption a line) or {key}.json")
    lines = [ink_from_rgb(decode_picture(files[ext], key + ext)) for ext in sorted(files) if ext.startswith(".lines")]
    conds = [decode_picture(files[ext], key + ext) for ext in sorted(files) if ext.startswith(".cond")]
    return Sample(key, decode_picture(files[picture], key + picture), lines, captions, meta, conds)


def split_name(name: str) -> tuple[str, str]:
    """`a/b.lines0.png` -> (`a/b`, `.lines0.png`); `a/b.v2.png` -> (`a/b.v2`, `.png`)."""
    stem, dot, ext = name.rpartition(".")
    head, _, middle = stem.rpartition(".")
    if middle.startswith(("lines", "cond")) and head:
        return head, f".{middle}.{ext.lower()}"
    return stem, f"{dot}{ext.lower()}"


def _tar_groups(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, files = None, {}
    with tarfile.open(path) as tar:
        for info in tar:
            if not info.isfile():
                continue
            name, ext = split_name(info.name)
            if name != key and files:
                yield key, files
                files = {}
            key = name
            files[ext] = tar.extractfile(info).read()
    if files:
        yield key, files


def _folder_groups(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tar"):
        key, ext = split_name(path.relative_to(folder).as_posix())
        if ext in PICTURES + (".txt", ".json") or ext.startswith((".lines", ".cond")):
            groups.setdefault(key, {})[ext] = path
    for key, paths in groups.items():
        if any(ext in PICTURES for ext in paths):
            yield key, {ext: path.read_bytes() for ext, path in paths.items()}


def read_samples(source: str | Path, split: str = "train") -> Iterator[Sample]:
    """Samples of a folder: its SPLIT-*.tar shards, or, without any shards, its loose pictures (then every split is the whole).

    Raises ValueError when the folder holds neither, or when more than half of what it holds is broken.
    """
    source = Path(source)
    shards = sorted(source.glob(f"{split}-*.tar"))
    if not shards and any(source.glob("*.tar")):
        raise ValueError(f"{source} has shards, but none named {split}-*.tar; found {[p.name for p in source.glob('*.tar')][:3]}")
    groups = (g for s in shards for g in _tar_groups(s)) if shards else _folder_groups(source)
    good = bad = 0
    for key, files in groups:
        try:
            sample = build_sample(key, files)
        except (ValueError, UnicodeDecodeError) as error:
            bad += 1
            log.warning("skipped %s (%d so far)", error, bad)
            continue
        good += 1
        yield sample
    if good == 0 or bad > good:
        raise ValueError(f"{source}: {good} usable samples, {bad} broken; wanted NAME.png + NAME.txt (+ NAME.lines.png), or {split}-*.tar shards")
