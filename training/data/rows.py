"""Many .npy files read as one array: what a cache built part by part looks like from outside."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np

OPEN_FILES = 256  # memory maps kept open at a time, of all arrays together: each holds a file descriptor
_maps: OrderedDict[Path, np.ndarray] = OrderedDict()


def _mapped(path: Path) -> np.ndarray:
    if path in _maps:
        _maps.move_to_end(path)
        return _maps[path]
    try:
        found = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there: decoded pictures are dropped once encoded where keep_pixels=false. If they are needed again (another "
                         "autoencoder, the autoencoder or decoder stage), delete the pixels-... folder of the cache and set keep_pixels=true") from error
    _maps[path] = found
    if len(_maps) > OPEN_FILES:
        _maps.popitem(last=False)
    return found


class Rows:
    """Arrays [n_i, ...] one after the other, as one array [N, ...] with `shape`, `dtype`, `len`, and reading by number, slice or
    array of numbers. A part is a path, opened when it is read, or an array; `tail` is the shape of a row, where it is known without."""

    def __init__(self, parts: list[tuple[Path | np.ndarray | Rows, int]], tail: tuple[int, ...] | None = None):
        self.tail = tail
        self.parts = [part for part, count in parts if count]
        self.ends = np.cumsum([count for _, count in parts if count])
        assert self.parts, "an array of no parts"

    def _part(self, i: int) -> np.ndarray | Rows:
        return _mapped(self.parts[i]) if isinstance(self.parts[i], Path) else self.parts[i]

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *(self.tail or self._part(0).shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self._part(0).dtype

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            row = int(index) % len(self)
            part = int(np.searchsorted(self.ends, row, side="right"))
            return self._part(part)[row - (self.ends[part - 1] if part else 0)]
        rows = np.arange(len(self))[index]  # slices, negative numbers and masks as in any array; IndexError where one is too large
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self.ends, rows, side="right")
        for part in np.unique(owner):
            mine = owner == part
            out[mine] = self._part(part)[rows[mine] - (self.ends[part - 1] if part else 0)]
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype) if dtype is not None else self[:]


def joined(arrays: list[np.ndarray | Rows]) -> np.ndarray | Rows:
    """Arrays one after the other, without copying."""
    return arrays[0] if len(arrays) == 1 else Rows([(a, len(a)) for a in arrays])


def forget(path: Path) -> None:
    """Closes a file that is about to be deleted, so that its space is free at once."""
    _maps.pop(path, None)
