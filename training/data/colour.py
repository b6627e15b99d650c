"""The colour of a picture: its name, and the same picture in another one (so that a prompt's colour means something)."""

from __future__ import annotations

import cv2
import numpy as np

from training.data.captions import GREYS, HUES


def hue_of(rgb: np.ndarray, alpha: np.ndarray) -> tuple[float, float]:
    """Dominant hue (degrees) and the share of the figure that is clearly coloured. rgb uint8 [H, W, 3], alpha uint8 [H, W]."""
    hsv = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    figure = alpha > 128
    weight = hsv[..., 1] * hsv[..., 2] * figure
    if figure.sum() == 0 or weight.sum() == 0:
        return 0.0, 0.0
    bins, edges = np.histogram(hsv[..., 0], bins=36, range=(0, 360), weights=weight)
    peak = np.convolve(np.r_[bins[-1], bins, bins[0]], [1, 1, 1], "valid").argmax()
    share = float((weight > 0.25).sum() / figure.sum())
    return float(edges[peak] + 5), share


def hue_distance(a: np.ndarray | float, b: float) -> np.ndarray | float:
    """Distance of two hues on the circle, degrees."""
    return np.abs((a - b + 180) % 360 - 180)


def colour_name(rgb: np.ndarray, alpha: np.ndarray) -> str | None:
    """The colour word that fits most of the figure, or None when no single one does."""
    figure = alpha > 128
    if not figure.any():
        return None
    hue, share = hue_of(rgb, alpha)
    if share < 0.3:
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[figure]
        if hsv[:, 1].mean() > 60:
            return None
        light = float(hsv[:, 2].mean())
        return "black" if light < 80 else "white" if light > 225 else "grey"
    hsv = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[figure]
    near = hue_distance(hsv[:, 0], hue) < 25
    if (near & (hsv[:, 1] > 0.2)).mean() < 0.4:
        return None
    name = min(HUES, key=lambda word: hue_distance(HUES[word], hue))
    if name in ("orange", "red") and float(hsv[near, 2].mean()) < 0.66:
        return "brown"
    return name


def recolour(rgb: np.ndarray, alpha: np.ndarray, colour: str) -> np.ndarray:
    """The picture with its dominant hue turned to `colour`; other hues, lightness and white paper stay."""
    hsv = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hue, _ = hue_of(rgb, alpha)
    part = np.clip(1.5 - hue_distance(hsv[..., 0], hue) / 40, 0, 1) * (hsv[..., 1] > 0.08)
    if colour in GREYS:
        hsv[..., 1] *= 1 - part
        gain, lift = {"black": (0.3, 0.0), "grey": (0.65, 0.0), "white": (0.25, 0.74)}[colour]
        hsv[..., 2] = hsv[..., 2] * (1 - part) + (hsv[..., 2] * gain + lift) * part
    else:
        hsv[..., 0] = (hsv[..., 0] + part * (HUES[colour] - hue)) % 360
        hsv[..., 1] = np.clip(hsv[..., 1] * (1 + 0.15 * part), 0, 1)
    out = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return np.round(np.clip(out, 0, 1) * 255).astype(np.uint8)
