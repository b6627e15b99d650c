"""Where samples come from: a folder of shards, a folder of pictures, tar files, or tar files over a URL or a command's output.

    data=my/folder                              SPLIT-*.tar shards, or NAME.png + NAME.txt pairs
    data=shards/{00000..00031}.tar              tar files by name
    data=https://host/{00000..00031}.tar        over the network (webdataset: http, https, s3, gs, hf, ...)
    data="pipe:ssh host cat {0..7}.tar"         the output of a command
    data=first*0.7,second*0.3                   a mixture of any of these, by weight

`pipe:` runs a command with your rights: it is read from the recipe and the command line, never from data or from a page.
Shards given by name have no splits: the last of several is held out for validation, a single one serves for both.
"""

from __future__ import annotations

import math
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import tar_file_iterator

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TAR = re.compile(r"\.(tar|tar\.gz|tgz)$")
URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """`a*0.7,b*0.3` -> [("a", 0.7), ("b", 0.3)], scaled to the sum 1; without a weight it is 1. ValueError names what is wrong.

    A comma within braces or behind a backslash does not separate. What exists as a path is one, whatever its name.
    """
    if text and Path(text).exists():
        return [(text, 1.0)]
    found = []
    for part in re.split(r"(?<!\\),(?![^{]*\})", text):
        part = part.strip().replace("\\,", ",")
        spec, star, number = part.rpartition("*")
        spec, number = (spec.strip(), number.strip()) if star else (part, "1")
        try:
            weight = float(number)
        except ValueError as error:
            if part.startswith("pipe:"):  # the star is the command's
                spec, weight = part, 1.0
            else:
                raise ValueError(f"data={text!r}: {number!r} after the * of {part!r} is not a weight; wanted path*0.7,path*0.3. "
                                 "Several files: path/{00000..00031}.tar") from error
        if not spec or not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"data={text!r}: {part!r} is no data set; wanted path*0.7,path*0.3 with weights above 0")
        found.append((spec, weight))
    total = sum(weight for _, weight in found)
    return [(spec, weight / total) for spec, weight in found]


def is_named(spec: str) -> bool:
    """Whether a data set is given as tar files or URLs by name, not as a folder."""
    return bool(URL.match(spec) or TAR.search(spec)) and not Path(spec).is_dir()


def list_shards(spec: str, split: str) -> list[str]:
    """The shards of one data set and split, in order: tar files, URLs, or the folder itself where it holds loose pictures."""
    if is_named(spec):
        try:
            names = list(braceexpand(spec))
        except UnbalancedBracesError as error:
            raise ValueError(f"data={spec!r}: {error}; wanted a range like {{00000..00031}}") from error
        missing = [n for n in names if not URL.match(n) and not Path(n).is_file()]
        if missing:
            raise ValueError(f"no data at {missing[0]} ({len(missing)} of {len(names)} shards of {spec} are missing)")
        return names if len(names) == 1 else names[:-1] if split == "train" else names[-1:]
    folder = Path(spec)
    if not folder.is_dir():
        raise ValueError(f"no data at {spec}: wanted a folder with NAME.png + NAME.txt pairs or *.tar shards")
    shards = sorted(folder.glob(f"{split}-*.tar"))
    if not shards and any(folder.glob("*.tar")):
        names = sorted(p.name for p in folder.glob("*.tar"))
        raise ValueError(f"{spec} has shards, but none named {split}-*.tar; found {names[:3]}. Shards of other names: data={spec}/{{00000..00031}}.tar")
    return [str(s) for s in shards] or [spec]


def has_held_out(spec: str) -> bool:
    """Whether a data set has pictures that are not trained on: a folder of loose pictures, or one single shard, has none."""
    return list_shards(spec, "val") != [spec]


def split_name(name: str) -> tuple[str, str]:
    """`a/b.lines0.png` -> (`a/b`, `.lines0.png`); `a/b.v2.png` -> (`a/b.v2`, `.png`)."""
    stem, dot, ext = name.rpartition(".")
    head, _, middle = stem.rpartition(".")
    if middle.startswith(("lines", "cond")) and head:
        return head, f".{middle}.{ext.lower()}"
    return stem, f"{dot}{ext.lower()}"


Group = tuple[str, "dict[str, bytes] | Exception"]  # key, and its files (extension -> bytes) or what is wrong with them


def groups(shard: str, start: int = 0) -> Iterator[Group]:
    """The samples of one shard from number `start` on, still in files. ValueError where the shard cannot be read at all."""
    if Path(shard).is_dir():
        yield from _folder_groups(Path(shard), start)
        return
    for number, group in enumerate(_tar_groups(shard)):
        if number >= start:
            yield group


def _tar_groups(shard: str) -> Iterator[Group]:
    """A tar file that is torn gives what lies before the tear; a transfer that fails stops, so that no cache is made of half of it."""
    key, files, torn = None, {}, None
    try:
        stream = gopen(shard) if URL.match(shard) else open(shard, "rb")
    except OSError as error:
        raise ValueError(f"{shard}: cannot be opened: {error}") from error
    try:
        try:
            for member in tar_file_iterator(stream):
                name, ext = split_name(member["fname"])
                if name != key and files:
                    yield key, files
                    files = {}
                key = name
                files[ext] = member["data"]
        except (tarfile.TarError, EOFError, zlib.error) as error:
            torn = error
        while stream.read(1 << 20):  # a pipe whose end is not read ends with an error
            pass
        stream.close()
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read: {error}. What was read before is kept: run the same command again to go on") from error
    finally:
        getattr(getattr(stream, "stream", stream), "close")()
    if torn is not None:
        yield shard, ValueError(f"{shard} is torn after {key}: {torn}")
    elif files:
        yield key, files


def _folder_groups(folder: Path, start: int) -> Iterator[Group]:
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tar"):
        key, ext = split_name(path.relative_to(folder).as_posix())
        if ext in PICTURES + (".txt", ".json") or ext.startswith((".lines", ".cond")):
            found.setdefault(key, {})[ext] = path
    for key, paths in [item for item in found.items() if any(ext in PICTURES for ext in item[1])][start:]:
        try:
            yield key, {ext: path.read_bytes() for ext, path in paths.items()}
        except OSError as error:
            yield key, error
