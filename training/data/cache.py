"""Decoded pictures on disk: one split of a data set at one size, memory-mapped, with captions, conditions and boxes.

It is built part by part, each renamed into place when complete, so that a build that was killed goes on where it stopped and no
more than one part is ever in memory. Caches of the first layout (one array for all) are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from training.data.drawing import line_drawing
from training.data.frames import Frame, may_flip, variants
from training.data.rows import Rows, forget, joined
from training.data.shards import Sample, enough, usable
from training.data.sources import groups, is_named, list_shards, parse_mixture
from training.regions import Detector, check_regions, load_detector

log = logging.getLogger(__name__)
# (sample, its fitted picture, fit: crops and resizes another raster of the sample as the picture was) -> condition rasters
Conditions = Callable[[Sample, np.ndarray, Callable[[np.ndarray], np.ndarray]], list[np.ndarray]]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def source_hash(source: str | Path, split: str) -> str:
    """Hash of a data set: a folder's manifest where it has one, else names, sizes and times of its files; of URLs the names only."""
    if is_named(str(source)):
        stat = lambda p: f"{p.stat().st_size} {p.stat().st_mtime_ns}" if p.is_file() else ""
        return digest(split, *(f"{s} {stat(Path(s))}" for s in list_shards(str(source), split)))
    source = Path(source)
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
    """Pictures of one shape in memory-mapped arrays. Inks of picture i are rows `first_ink[i] : first_ink[i + 1]` of `inks`."""

    images: np.ndarray | Rows  # uint8 [N, H, W, 3]
    inks: np.ndarray | Rows    # conditions: ink uint8 [M, H, W], 255 = ink (or depth, 255 = near), or pictures in colour uint8 [M, H, W, 3]
    first_ink: np.ndarray      # int64 [N + 1]
    captions: list[list[str]]
    meta: list[dict]
    hash: str
    keys: list[str] = field(default_factory=list)
    regions: list[list[dict]] = field(default_factory=list)           # boxes in parts of the picture (regions.py); [] = none at all
    parts: list[tuple[int, int, str]] = field(default_factory=list)   # (pictures, inks, content hash) of each part; [] = first layout


@dataclass(frozen=True)
class Reading:
    """How pictures become rasters."""

    buckets: dict[str, tuple[int, int]] | None = None  # bucket table (buckets.py); None = square
    augment: int = 0                                   # further cropped and mirrored rasters of each picture
    augment_crop: float = 0.85                         # the smallest crop, in parts of the side
    detector: str = ""                                 # module:function that finds boxes where a picture brings none
    part_mb: int = 512                                 # size of a part in memory; not a part of the cache's key

    def key(self) -> list[str]:
        """What a cache's key has beside the first layout's."""
        return ([f"buckets {sorted(self.buckets.values())}"] if self.buckets else []) + (
            [f"augment {self.augment} {self.augment_crop}"] if self.augment else []) + ([f"detector {self.detector}"] if self.detector else [])


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop to a square, then resize to `size` px."""
    return Frame(size, size).picture(image)


def _draw(image: np.ndarray, key: str, number: int) -> np.ndarray:
    """A drawing for a picture that came without one. Its silhouette is what differs from the border's colour."""
    paper = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    alpha = np.where(np.abs(image.astype(np.float32) - paper).max(-1) > 24, 255, 0).astype(np.uint8)
    rng = np.random.default_rng(int(digest(key, str(number)), 16))
    return line_drawing(np.ascontiguousarray(image), alpha, rng)


def _drawings(sample: Sample, frame: Frame) -> list[np.ndarray]:
    """The sample's drawings, or two of our own; a picture far larger than wanted is drawn from a smaller copy, for memory's sake."""
    if sample.lines:
        return sample.lines
    image, most = sample.image, 4 * max(frame.height, frame.width)
    if min(image.shape[:2]) > most:
        scale = most / min(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return [_draw(image, sample.key, i) for i in range(2)]


class _Part:
    """A part being collected: arrays by shape, and what was broken. `start`: number of its first sample in the shard."""

    def __init__(self, start: int):
        self.start, self.end, self.bytes, self.broken, self.sets = start, start, 0, [], {}

    def add(self, sample: Sample, frames: list[Frame], conditions: Conditions | None, detector: Detector | None) -> None:
        regions = check_regions(sample.meta.pop("regions", []), f"{sample.key}.json")
        if detector and not regions:
            regions = check_regions(detector(sample.image), f"{sample.key}, detected")
        drawings = _drawings(sample, frames[0]) if conditions is None else []
        for frame in frames:
            image = frame.picture(sample.image)
            inks = [frame.ink(ink) for ink in drawings] if conditions is None else conditions(sample, image, frame.picture)
            names = ("images", "inks", "counts", "captions", "meta", "keys", "regions")
            rows = self.sets.setdefault(f"{frame.height}x{frame.width}", {name: [] for name in names})
            rows["images"].append(image)
            rows["inks"] += inks
            rows["counts"].append(len(inks))
            found = frame.regions(regions, sample.image.shape)
            for name, value in (("captions", sample.captions), ("meta", sample.meta), ("keys", sample.key), ("regions", found)):
                rows[name].append(value)
            self.bytes += image.nbytes + sum(ink.nbytes for ink in inks)

    def write(self, folder: Path, last: bool) -> Path:
        """Writes and empties the part."""
        about: dict = {"start": self.start, "end": self.end, "last": last, "broken": self.broken, "sets": {}}

        def build(temporary: Path) -> None:
            for shape, rows in self.sets.items():
                (temporary / shape).mkdir()
                h = hashlib.sha256(shape.encode())
                for name in ("images", "inks"):
                    array = np.stack(rows.pop(name))
                    rows[f"{name}_shape"] = array.shape[1:]
                    h.update(array)
                    np.save(temporary / shape / f"{name}.npy", array)
                about["sets"][shape] = {**rows, "hash": h.hexdigest()[:32]}
            (temporary / "about.json").write_text(json.dumps(about))
        return once(folder, build)


def _build(folder: Path, source: str, split: str, size: int, reading: Reading, condition: str, conditions: Conditions | None) -> Iterator[Path]:
    """The parts of a cache, those that are there and those still to be built, in order."""
    if reading.buckets:
        from training.data.buckets import nearest  # imports pipelines of diffusers: several seconds
    detector = load_detector(reading.detector)
    bar = tqdm(desc=f"reading {split}", unit=" pictures", mininterval=5)

    def frames_of(sample: Sample) -> list[Frame]:
        frame = Frame(*nearest(sample.image.shape, reading.buckets)) if reading.buckets else Frame(size, size)
        return [frame, *variants(frame, reading.augment, reading.augment_crop, sample.key, reading.augment and may_flip(sample.captions, sample.meta))]

    for number, shard in enumerate(list_shards(source, split)):
        start, piece, last = 0, 0, False
        path = lambda: folder / f"part-{number:05d}-{piece:05d}"
        while path().exists():
            about = json.loads((path() / "about.json").read_text())
            start, last = about["end"], about["last"]
            yield path()
            piece += 1
        if last:
            continue
        part = _Part(start)
        for key, files in groups(shard, start):
            part.end += 1
            try:
                sample = usable(key, files)
                part.add(sample, frames_of(sample), conditions, detector)
                bar.update()
            except ValueError as error:
                if conditions is not None and condition != "own":  # a network that cannot be loaded is no fault of the picture's
                    raise
                part.broken.append(str(error))
                log.warning("skipped %s (%d so far in this part)", error, len(part.broken))
            if part.bytes >= reading.part_mb * 2 ** 20:
                yield part.write(path(), False)
                part, piece = _Part(part.end), piece + 1
        yield part.write(path(), True)
    bar.close()


def _load(paths: list[Path], key: str) -> list[Pixels]:
    """The pictures of the given parts, those of each shape together; the shape with the most pictures first."""
    found: dict[str, list[tuple[Path, dict]]] = {}
    for path in paths:
        for shape, about in json.loads((path / "about.json").read_text())["sets"].items():
            found.setdefault(shape, []).append((path / shape, about))
    sets = []
    for parts in found.values():
        rows = lambda name: [row for _, about in parts for row in about[name]]
        counts = rows("counts")
        sizes = [(len(about["counts"]), sum(about["counts"]), about["hash"]) for _, about in parts]
        array = lambda name, i: Rows([(path / f"{name}.npy", size[i]) for (path, _), size in zip(parts, sizes)], tuple(parts[0][1][f"{name}_shape"]))
        sets.append(Pixels(array("images", 0), array("inks", 1), np.cumsum([0, *counts]), rows("captions"), rows("meta"), key, rows("keys"), rows("regions"), sizes))
    return sorted(sets, key=lambda p: -len(p.meta))


def pixel_sets(source: str, split: str, size: int, cache: Path, condition: str = "lines", conditions: Conditions | None = None,
               reading: Reading = Reading(), each: Callable[[list[Pixels]], None] | None = None) -> list[Pixels]:
    """All pictures of one data set and split, by shape: of `size` px, or in buckets of about size². `condition` names what `conditions`
    makes, down to its network (conditions.condition_key).

    `each` sees every part as it is built; where it is given, the decoded pictures of the part are dropped after it.
    """
    key = digest(source_hash(source, split), str(size), "pixels-2", *([] if condition == "lines" else [condition]), *reading.key())
    folder = cache / f"pixels-{split}-{key}"
    if (folder / "images.npy").exists():  # the first layout
        about = json.loads((folder / "about.json").read_text())
        load = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
        return [Pixels(load("images"), load("inks"), np.load(folder / "first_ink.npy"), about["captions"], about["meta"], key, about["keys"])]
    done = folder / "complete.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        good, broken = 0, []
        for part in _build(folder, source, split, size, reading, condition, conditions):
            about = json.loads((part / "about.json").read_text())
            good += sum(len(s["counts"]) for s in about["sets"].values()) // (1 + reading.augment)
            broken += about["broken"]
            if each is not None and about["sets"]:
                each(_load([part], key))
                for file in part.glob("*x*/*.npy"):
                    forget(file)
                    file.unlink()
        enough(source, split, good, broken, len(broken))
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps({"good": good, "broken": broken}))
        os.replace(temporary, done)
    about = json.loads(done.read_text())
    if about["broken"]:
        log.warning("%s, %s: %d pictures, %d broken ones skipped, such as: %s", source, split, about["good"], len(about["broken"]), about["broken"][0])
    return _load(sorted(p for p in folder.glob("part-*") if p.suffix != ".incomplete"), key)


def join_pixels(sets: list[Pixels]) -> Pixels:
    """Pictures of one shape from several data sets, one after the other."""
    if len(sets) == 1:
        return sets[0]
    counts = np.concatenate([np.diff(s.first_ink) for s in sets])
    rows = lambda name: [row for s in sets for row in getattr(s, name)]
    regions = [boxes for s in sets for boxes in (s.regions or [[]] * len(s.meta))]
    return Pixels(joined([s.images for s in sets]), joined([s.inks for s in sets]), np.cumsum([0, *counts]), rows("captions"), rows("meta"),
                  digest(*(s.hash for s in sets)), rows("keys"), regions, rows("parts") if all(s.parts for s in sets) else [])


def pixel_cache(source: str | Path, split: str, size: int, cache: Path, condition: str = "lines", conditions: Conditions | None = None) -> Pixels:
    """All pictures of a split, or of a mixture, at `size` px square, and their conditions: line drawings, or what `conditions` makes
    (training/conditions.py)."""
    return join_pixels([pixel_sets(spec, split, size, cache, condition, conditions)[0] for spec, _ in parse_mixture(str(source))])
