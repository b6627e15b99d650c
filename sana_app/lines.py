"""Ink to condition: the one path a drawing takes into the model, on the page and in training alike.

`ink` is a uint8 raster [H, W], 255 = full ink, 0 = bare paper. The model sees white lines on black in [-1, 1].
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

# A one-pixel pen line on a 512 px page covers a quarter of a 128 px cell: averaging alone would leave it grey and
# its grey value would depend on the page's size. The gain brings any line of at least ~1/400 of the page to full ink.
INK_GAIN = 2.0


def ink_from_rgb(image: np.ndarray) -> np.ndarray:
    """A picture of a drawing -> ink [H, W] uint8, whatever its polarity.

    `image` is uint8 [H, W], [H, W, 3] or [H, W, 4] (transparent = paper). The paper is taken to be the median of
    the whole: lines cover less than half of it, while a drawing that fills the page may well run along its border.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"a drawing is uint8 [H, W], [H, W, 3] or [H, W, 4]; got {image.dtype} {image.shape}")
    grey = image.astype(np.float32)
    if image.ndim == 3:
        grey = grey[..., :3] @ np.float32([0.299, 0.587, 0.114])
        if image.shape[2] == 4:
            alpha = image[..., 3].astype(np.float32) / 255
            if alpha.min() < 1:  # strokes on transparent paper: the alpha channel is the drawing
                return np.round(alpha * 255).astype(np.uint8)
    paper = float(np.median(grey))
    ink = np.abs(grey - paper) / max(paper, 255 - paper, 1.0)
    return np.round(np.clip(ink, 0, 1) * 255).astype(np.uint8)


def resize_ink(ink: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Ink of any size -> uint8 [size, size], or [height, width]; area average down, linear up, thin lines kept at full strength."""
    if ink.dtype != np.uint8 or ink.ndim != 2 or 0 in ink.shape:
        raise ValueError(f"ink is uint8 [H, W] with 255 = ink; got {ink.dtype} {ink.shape}")
    height, width = size if isinstance(size, tuple) else (size, size)
    if ink.shape == (height, width):
        return ink
    shrinking = min(ink.shape) > min(height, width)
    out = cv2.resize(ink, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    if shrinking:
        out = np.clip(out.astype(np.float32) * INK_GAIN, 0, 255).astype(np.uint8)
    return out


def condition_from_ink(ink: np.ndarray, size: int) -> torch.Tensor:
    """Ink [H, W] uint8 -> condition [1, 3, size, size] float32 in [-1, 1], white lines (+1) on black (-1)."""
    plane = torch.from_numpy(resize_ink(ink, size).astype(np.float32)) / 127.5 - 1
    return plane.expand(1, 3, size, size).contiguous()
