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
from training.data.sources import PICTURES, groups, list_shards

log = logging.getLogger(__name__)


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
    # a photograph is turned as its EXIF data say, which IMREAD_UNCHANGED would ignore
    flags = cv2.IMREAD_COLOR if data[:2] == b"\xff\xd8" else cv2.IMREAD_UNCHANGED
    try:
        raw = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error as error:  # more pixels than OpenCV reads
        raise ValueError(f"{name}: {str(error).strip()}") from error
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


def read_captions(key: str, files: dict[str, bytes]) -> tuple[list[str], dict]:
    """(captions, everything else in KEY.json). The captions are those of KEY.json, else the lines of KEY.txt."""
    meta: dict = {}
    if ".json" in files:
        try:
            meta = json.loads(files[".json"])
        except ValueError as error:
            raise ValueError(f"{key}.json: not JSON: {error}") from error
        if not isinstance(meta, dict):
            raise ValueError(f"{key}.json: holds a {type(meta).__name__}, wanted an object like {{\"caption\": \"...\"}}")
    if "captions" in meta or "caption" in meta:
        captions = [str(c) for c in meta.pop("captions", [])] or [str(meta.pop("caption", ""))]
    elif ".txt" in files:
        captions = [line.strip() for line in files[".txt"].decode("utf-8", "replace").splitlines() if line.strip()] or [""]
    else:
        raise ValueError(f"{key}: no caption; wanted {key}.txt (one caption a line) or {key}.json")
    return captions, meta


def build_sample(key: str, files: dict[str, bytes]) -> Sample:
    """Files of one key (extension -> bytes) -> Sample. ValueError names what is missing or broken."""
    picture = next((ext for ext in PICTURES if ext in files), None)
    if picture is None:
        raise ValueError(f"{key}: no picture; wanted one of {', '.join(key + e for e in PICTURES)}")
    captions, meta = read_captions(key, files)
    image = decode_picture(files[picture], key + picture)
    lines = [ink_from_rgb(decode_picture(files[ext], key + ext)) for ext in sorted(files) if ext.startswith(".lines")]
    for ink in lines:
        if abs(ink.shape[1] * image.shape[0] / (ink.shape[0] * image.shape[1]) - 1) > 0.02:
            raise ValueError(f"{key}: the lines are {ink.shape[1]}x{ink.shape[0]}, the picture {image.shape[1]}x{image.shape[0]}: they must have one aspect ratio")
    conds = [decode_picture(files[ext], key + ext) for ext in sorted(files) if ext.startswith(".cond")]
    return Sample(key, image, lines, captions, meta, conds)


def enough(source: str | Path, split: str, good: int, broken: list[str], count: int) -> None:
    """ValueError when nothing, or less than half, of a data set is usable. `broken`: some of the `count` messages."""
    if good == 0 or count > good:
        raise ValueError(f"{source}: {good} usable samples, {count} broken; wanted NAME.png + NAME.txt (+ NAME.lines.png), or {split}-*.tar shards"
                         + (f". The first: {broken[0]}" if broken else ""))


def read_samples(source: str | Path, split: str = "train") -> Iterator[Sample]:
    """Samples of one data set (sources.py): its SPLIT-*.tar shards, or, without any shards, its loose pictures (then every split is
    the whole).

    Raises ValueError when the folder holds neither, or when more than half of what it holds is broken.
    """
    good, broken = 0, []
    for shard in list_shards(str(source), split):
        for key, files in groups(shard):
            try:
                sample = usable(key, files)
            except ValueError as error:
                broken.append(str(error))
                log.warning("skipped %s (%d so far)", error, len(broken))
                continue
            good += 1
            yield sample
    enough(source, split, good, broken, len(broken))


def usable(key: str, files: dict[str, bytes] | Exception) -> Sample:
    """The sample of one group of files. ValueError names what is broken."""
    if isinstance(files, Exception):
        raise ValueError(str(files)) from files
    return build_sample(key, files)
