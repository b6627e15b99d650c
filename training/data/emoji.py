"""Builds the emoji data set: picture, line drawings, captions, as webdataset shards, from packages of the npm registry.

    python -m training.data.emoji --out runs/emoji-128 --size 128

The same command gives the same bytes. Concepts (a code point sequence without skin tone) are split whole: no style,
tone or augmented copy of a held-out concept is ever trained on. Flags, keycaps and letter symbols are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from sana_app.lines import resize_ink
from training.data.cache import once
from training.data.captions import GREYS, HUES, captions
from training.data.colour import colour_name, hue_of, recolour
from training.data.drawing import line_drawing
from training.data.shards import Sample, ShardWriter

PACKAGES = {  # style -> (npm package, licence)
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "MIT"),
    "flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "MIT"),
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
}
LABELS = ("emojibase-data@17.0.0", "MIT")
TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
PEOPLE, COMPONENT, SYMBOLS, FLAGS = 1, 2, 8, 9  # emojibase groups
GEOMETRIC = 96  # the one symbol subgroup that people draw: coloured circles, squares, diamonds
RENDER_PX = 256


@dataclass(frozen=True)
class Item:
    """One picture to make. `source` is an SVG text, or the path of a WebP file; `copy` 0 is the original, 1 an augmented one."""

    key: str
    concept: str
    style: str
    source: str
    label: str
    tags: tuple[str, ...]
    group: int
    toned: bool
    copy: int


def npm_pack(package: str, tarball: Path, work: Path) -> None:
    """PACKAGE@VERSION from the npm registry to `tarball`, by way of the folder `work`: a stopped npm leaves no half of it there."""
    npm = shutil.which("npm")
    by_hand = f"or put the package's tarball at {tarball} yourself; then run the same command again"
    if npm is None:
        raise ValueError(f"wanted {package}, but npm, which fetches it, is not installed. Install Node.js, which brings it, {by_hand}")
    # --silent would also hide why it failed
    done = subprocess.run([npm, "pack", package, "--loglevel=error"], cwd=work, capture_output=True, text=True, errors="replace")
    if done.returncode or not (work / tarball.name).exists():
        said = "\n  ".join(done.stderr.strip().splitlines()[-6:]) or f"nothing, and made no {tarball.name}"
        raise ValueError(f"wanted {package}, but `npm pack` failed with exit status {done.returncode}. It said:\n  {said}\n"
                         f"Is the network there, and the registry that npm is set to? Mend that, {by_hand}")
    os.replace(work / tarball.name, tarball)


def fetch(package: str, cache: Path) -> Path:
    """PACKAGE@VERSION, unpacked in `cache` (once): the folder appears whole or not at all. ValueError says why it cannot."""
    name, _, version = package.lstrip("@").replace("/", "-").rpartition("@")
    tarball = cache / f"{name}-{version}.tgz"

    def unpack(folder: Path) -> None:
        if not tarball.exists():
            npm_pack(package, tarball, folder)
        try:
            with tarfile.open(tarball) as tar:
                members = [m for m in tar.getmembers() if m.name.startswith("package/")]
                for member in members:
                    member.name = member.name.removeprefix("package/")
                tar.extractall(folder, members, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError(f"{tarball}: wanted the whole tarball of {package}, it cannot be read: {error}. Delete it and run the same "
                             "command again") from error

    return once(cache / f"{name}-{version}", unpack)


def plain(code: str) -> str:
    """Code point sequence as lower-case hex without the presentation selector FE0F."""
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


def concept_of(code: str) -> str:
    """`plain` without skin tones: the unit of the split."""
    return "-".join(p for p in plain(code).split("-") if p not in TONES)


def is_held_out(concept: str, share: float = 0.05) -> bool:
    """Whether a concept belongs to the validation split; depends on nothing but its name."""
    return int(hashlib.sha256(concept.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF < share


def svg_sources(folder: Path, codes_from: Path | None = None) -> dict[str, str]:
    """Code -> SVG text for an iconify package. `codes_from`: a sister package whose chars.json names the same icons."""
    data = json.loads((folder / "icons.json").read_text())
    chars = json.loads(((codes_from or folder) / "chars.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    found = {}
    for code, name in chars.items():
        name = data.get("aliases", {}).get(name, {}).get("parent", name)
        icon = data["icons"].get(name)
        if icon is not None:
            box = f'0 0 {icon.get("width", width)} {icon.get("height", height)}'
            found[plain(code)] = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                                  f'viewBox="{box}">{icon["body"]}</svg>')
    return found


def load_labels(folder: Path) -> dict[str, dict]:
    """Code -> {label, tags, group, toned} for everything people draw."""
    found = {}
    for entry in json.loads((folder / "en" / "data.json").read_text()):
        group = entry.get("group")
        if group is None or group in (COMPONENT, FLAGS) or (group == SYMBOLS and entry.get("subgroup") != GEOMETRIC):
            continue
        for form in (entry, *entry.get("skins", ())):
            found[plain(form["hexcode"])] = {"label": form["label"], "tags": entry.get("tags", ()), "group": group,
                                             "toned": form is not entry}
    return found


def list_items(cache: Path) -> list[Item]:
    """Every picture of the data set, in a fixed order."""
    labels = load_labels(fetch(LABELS[0], cache))
    folders = {style: fetch(package, cache) for style, (package, _) in PACKAGES.items()}
    sources = {style: svg_sources(folders[style], folders["flat"] if style == "fluent" else None)
               for style in PACKAGES if style != "3d"}
    sources["3d"] = {plain(p.stem): str(p) for p in sorted((folders["3d"] / "assets").glob("*.webp"))}
    items = []
    for code in sorted(labels):
        about = labels[code]
        for style in PACKAGES:
            if code not in sources[style]:
                continue
            copies = (0,) if about["toned"] or is_held_out(concept_of(code)) else (0, 1)
            items += [Item(f"{code}_{style}_{copy}", concept_of(code), style, sources[style][code], about["label"],
                           tuple(about["tags"]), about["group"], about["toned"], copy) for copy in copies]
    return items


def render(source: str) -> np.ndarray:
    """SVG text or WebP path -> RGBA uint8 [256, 256, 4]."""
    import resvg_py
    if source.startswith("<svg"):
        data = np.frombuffer(bytes(resvg_py.svg_to_bytes(svg_string=source, width=RENDER_PX, height=RENDER_PX)), np.uint8)
        raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    else:
        raw = cv2.imread(source, cv2.IMREAD_UNCHANGED)
    if raw.ndim != 3:
        raise ValueError(f"{source[:80]}: rendered without colour")
    if raw.shape[2] == 3:
        raw = np.dstack([raw, np.full(raw.shape[:2], 255, np.uint8)])
    if raw.shape[:2] != (RENDER_PX, RENDER_PX):
        raw = cv2.resize(raw, (RENDER_PX, RENDER_PX), interpolation=cv2.INTER_AREA)
    return raw[..., [2, 1, 0, 3]]


def over_white(rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RGBA uint8 -> (RGB over white, alpha), both uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8), rgba[..., 3]


def move(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy that is flipped, turned, smaller or off centre: people do not draw in the middle of the page."""
    if rng.random() < 0.5:
        rgba = rgba[:, ::-1]
    size = rgba.shape[0]
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), float(rng.normal() * 8), float(rng.uniform(0.65, 1.0)))
    turn[:, 2] += rng.uniform(-0.1, 0.1, 2) * size
    premultiplied = rgba.astype(np.float32)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    out = cv2.warpAffine(premultiplied, turn, (size, size), flags=cv2.INTER_AREA)
    out[..., :3] *= 255 / np.maximum(out[..., 3:], 1)
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def make_sample(item: Item, size: int) -> Sample:
    """Render, augment and draw one item at `size` px. Random choices depend on the key alone."""
    rng = np.random.default_rng(int(hashlib.sha256(item.key.encode()).hexdigest()[:16], 16))
    cv2.setNumThreads(1)
    rgba = render(item.source)
    if item.copy:
        rgba = move(rgba, rng)
    rgb, alpha = over_white(rgba)
    hue, share = hue_of(rgb, alpha)
    recoloured = bool(item.copy) and item.group != PEOPLE and share > 0.3 and rng.random() < 0.7
    if recoloured:
        colour = str(rng.choice([*HUES, *GREYS]))
        rgb = recolour(rgb, alpha, colour)
    else:
        colour = None if item.group == PEOPLE else colour_name(rgb, alpha)
    inks = [line_drawing(rgb, alpha, rng) for _ in range(1 if item.toned else 2)]
    inks = [resize_ink(ink, size) for ink in inks]  # as the page does with what is drawn on it
    if size != RENDER_PX:
        rgb = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA)
    meta = {"concept": item.concept, "style": item.style, "group": item.group, "toned": item.toned, "copy": item.copy,
            "label": item.label, "colour": colour}
    return Sample(item.key, rgb, inks, captions(item.label, list(item.tags), item.style, colour, recoloured, rng), meta)


def _work(task: tuple[Item, int]) -> Sample | str:
    try:
        return make_sample(*task)
    except (ValueError, cv2.error) as error:
        return f"{task[0].key}: {error}"


def check_out(out: Path) -> None:
    """ValueError unless a build may take the place of the folder `out`: absent, or with no shards but an earlier build's."""
    if not out.exists():
        return
    entries = sorted(out.iterdir()) if out.is_dir() and not out.is_mount() and out != Path.cwd() else None
    if entries is None or any(e.is_dir() for e in entries):
        raise ValueError(f"--out {out}: wanted a new folder or that of an earlier build, which is replaced whole; this is a file, the "
                         "folder you are in, a disk, or a folder with others in it. Name a folder in it")
    try:
        named = json.loads((out / "manifest.json").read_text())["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # no manifest, a torn one, or another program's
        named = {}
    strange = [e.name for e in entries if e.suffix == ".tar" and e.name not in named]
    if strange:
        raise ValueError(f"--out {out}: {strange[0]} ({len(strange)} such) is there, but no manifest.json that names it: it is yours, or of "
                         "a build that was stopped. Move or delete it, or name another folder")


def move_into_place(new: Path, out: Path, old: Path) -> None:
    """The complete folder `new` becomes `out`. Whatever moment it is stopped at, `out` is one whole build or is absent: shards moved
    one by one would, for a moment, be a part of a data set that trains like a whole one. A README and the like stay."""
    if out.exists():
        for path in out.iterdir():
            if path.suffix != ".tar" and path.name != "manifest.json":
                shutil.copy2(path, new)
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def build(out: Path, size: int, cache: Path, workers: int = 2, every: int = 1, limit: int = 0) -> dict:
    """Builds the shards and returns the manifest, which is also written to OUT/manifest.json. An earlier build there is replaced
    when the new one is complete; until then all is in OUT.incomplete.

    `every` n keeps each n-th concept. `limit` n keeps n random training pictures and n/8 held-out ones; 0 keeps all.
    """
    out = out.resolve()
    new, old = (out.parent / (out.name + ending) for ending in (".incomplete", ".replaced"))
    if old.exists() and not out.exists():  # stopped between the two renames of move_into_place
        os.replace(old, out)
    check_out(out)
    items = list_items(cache)
    if every > 1:
        concepts = sorted({i.concept for i in items})[::every]
        items = [i for i in items if i.concept in set(concepts)]
    items = [items[i] for i in np.random.default_rng(0).permutation(len(items))]  # shards are well mixed
    if limit:
        held_out = [i for i in items if is_held_out(i.concept)]
        items = [i for i in items if not is_held_out(i.concept)][:limit] + held_out[:max(1, limit // 8)]
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    writers = {split: ShardWriter(new, split) for split in ("train", "val")}
    skipped, styles = [], dict.fromkeys(PACKAGES, 0)
    with multiprocessing.Pool(workers) as pool:
        tasks = ((item, size) for item in items)
        for sample in tqdm(pool.imap(_work, tasks, chunksize=16), total=len(items), desc=f"emoji {size} px", mininterval=5):
            if isinstance(sample, str):
                skipped.append(sample)
                continue
            writers["val" if is_held_out(sample.meta["concept"]) else "train"].write(sample)
            styles[sample.meta["style"]] += 1
    for writer in writers.values():
        writer.close()
    shards = [p for w in writers.values() for p in w.paths]
    manifest = {
        "size_px": size, "samples": {split: w.count for split, w in writers.items()}, "styles": styles,
        "concepts": len({i.concept for i in items}), "held_out_concepts": len({i.concept for i in items if is_held_out(i.concept)}),
        "skipped": skipped,
        "sources": {**{s: {"package": p, "licence": lic} for s, (p, lic) in PACKAGES.items()},
                    "labels": {"package": LABELS[0], "licence": LABELS[1]}},
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards},
    }
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    move_into_place(new, out, old)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in px")
    parser.add_argument("--cache", type=Path, default=Path("runs/raw"), help="where the downloaded packages are kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="keep each n-th concept only")
    parser.add_argument("--limit", type=int, default=0, help="keep this many training pictures, and an eighth of it held out")
    args = parser.parse_args()
    if not 32 <= args.size <= RENDER_PX:
        parser.error(f"--size {args.size}: wanted 32 to {RENDER_PX} px")
    try:
        manifest = build(args.out, args.size, args.cache, args.workers, args.every, args.limit)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({k: manifest[k] for k in ("samples", "styles", "concepts", "held_out_concepts")}))


if __name__ == "__main__":
    main()
