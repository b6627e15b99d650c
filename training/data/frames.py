"""How a picture is cropped, flipped and resized, and with it, from the same numbers, its lines, its conditions and its boxes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import cv2
import numpy as np

from sana_app.lines import resize_ink

# captions of pictures that are no longer true when mirrored: writing, numbers, sides
UNFLIPPABLE = re.compile(r"\b(left|right|clockwise|text|letters?|words?|writing|written|handwriting|calligraphy|inscription|lettering|fonts?|"
                         r"signs?|signboard|says|saying|reads|labels?|labell?ed|logos?|titled?|caption|numbers?|numerals?|digits?|clocks?|watch|"
                         r"o['’]clock|flags?|maps?|keyboard|calendar|newspaper|banner|poster|book cover|licen[cs]e plate)\b|[\"“”«»]", re.IGNORECASE)


@dataclass(frozen=True)
class Frame:
    """The part of a picture that is taken, and the size in px it comes out with.

    It is the largest part of the wanted aspect ratio, in the middle of the picture; of that, `zoom` of either side, with `top` and
    `left` (0 to 1) for where in it. So no crop shows what the plain one does not, and its caption speaks of the same things.
    """

    height: int
    width: int
    zoom: float = 1.0
    top: float = 0.5
    left: float = 0.5
    flip: bool = False

    def rect(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop in a raster of `shape`, px."""
        rows, columns = shape[:2]
        if rows * self.width >= columns * self.height:
            height, width = min(rows, round(columns * self.height / self.width)), columns
        else:
            height, width = rows, min(columns, round(rows * self.width / self.height))
        part = max(1, round(height * self.zoom)), max(1, round(width * self.zoom))
        top, left = (rows - height) // 2 + int((height - part[0]) * self.top), (columns - width) // 2 + int((width - part[1]) * self.left)
        return top, left, *part

    def cut(self, raster: np.ndarray) -> np.ndarray:
        top, left, height, width = self.rect(raster.shape)
        found = raster[top:top + height, left:left + width]
        return np.ascontiguousarray(found[:, ::-1]) if self.flip else found

    def picture(self, raster: np.ndarray) -> np.ndarray:
        """uint8 [H, W, ...] -> [height, width, ...]."""
        found = self.cut(raster)
        if found.shape[:2] == (self.height, self.width):
            return found
        smaller = found.shape[0] > self.height
        return cv2.resize(found, (self.width, self.height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)

    def ink(self, ink: np.ndarray) -> np.ndarray:
        """Ink uint8 [H, W] -> [height, width], thin lines kept."""
        return resize_ink(self.cut(ink), (self.height, self.width))

    def regions(self, regions: list[dict], shape: tuple[int, ...]) -> list[dict]:
        """Boxes [x0, y0, x1, y1] in px of the picture of `shape` -> in parts of the frame, 0 to 1. One that is cut off by more than
        three quarters goes."""
        top, left, height, width = self.rect(shape)
        found = []
        for region in regions:
            x0, y0, x1, y1 = region["box"]
            inside = np.clip([(x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height], 0, 1)
            kept = (inside[2] - inside[0]) * (inside[3] - inside[1]) * width * height
            if kept < 0.25 * (x1 - x0) * (y1 - y0):
                continue
            if self.flip:
                inside[[0, 2]] = 1 - inside[[2, 0]]
            found.append({**region, "box": [round(float(v), 6) for v in inside]})
        return found


def may_flip(captions: list[str], meta: dict) -> bool:
    """Whether a picture is still what its captions say when mirrored. KEY.json may forbid it: "flip": false."""
    return meta.get("flip") is not False and not any(UNFLIPPABLE.search(c) for c in captions)


def variants(frame: Frame, count: int, smallest: float, key: str, flippable: bool) -> list[Frame]:
    """`count` random frames beside `frame`, a function of the picture's key: crops with `smallest` of the side at least, half of them
    mirrored where that is allowed."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{key} variant {number}".encode()).digest()[:8], "big"))
        zoom, top, left, side = rng.uniform(smallest, 1), rng.random(), rng.random(), rng.random()
        found.append(Frame(frame.height, frame.width, float(zoom), float(top), float(left), bool(flippable and side < 0.5)))
    return found
