"""What a picture is judged by: short pure functions on arrays. `training.evaluate` applies them to a model.

`rgb` is uint8 [H, W, 3], `ink` uint8 [H, W] with 255 = ink, `figure` bool [H, W]. PSNR lives in training.autoencoder.
"""

from __future__ import annotations

import cv2
import numpy as np
from skimage.morphology import skeletonize

from training.data.captions import HUES
from training.data.colour import hue_distance, hue_of

# Lines are compared at this size whatever the picture's, so that one tolerance and one edge detector serve all.
LINES_PX = 256
TOLERANCE_PX = 3.0
# Canny's blur and upper threshold (the lower is 0.4 of it), fixed on 200 training pictures as the plain middle of a flat
# optimum: real pictures score 0.84 against their own lines and 0.20 against another picture's, at 128 px; 0.83 and 0.19
# at 64 px. Half or twice the threshold costs 0.02 and 0.03. Colour (RGB) separates slightly better than Lab or grey.
CANNY_BLUR_PX = 1.4
CANNY_HIGH = 80.0


# ---- lines ------------------------------------------------------------------------------------------------------


def _square(image: np.ndarray, interpolation: int) -> np.ndarray:
    return cv2.resize(image, (LINES_PX, LINES_PX), interpolation=cv2.INTER_AREA if min(image.shape[:2]) > LINES_PX else interpolation)


def centre_lines(ink: np.ndarray) -> np.ndarray:
    """Ink -> one-pixel centre lines of its strokes, bool [256, 256]: the width of the pen does not count."""
    return skeletonize(_square(ink, cv2.INTER_LINEAR) > 127)


def picture_edges(rgb: np.ndarray) -> np.ndarray:
    """Canny edges over the strongest of the three colour channels, bool [256, 256]."""
    soft = cv2.GaussianBlur(_square(rgb, cv2.INTER_CUBIC), (0, 0), CANNY_BLUR_PX)
    return cv2.Canny(soft, 0.4 * CANNY_HIGH, CANNY_HIGH, L2gradient=True) > 0


def share_near(a: np.ndarray, b: np.ndarray, tolerance_px: float) -> float:
    """Share of the points of `a` that have a point of `b` within `tolerance_px` (Euclidean). Bool [H, W] twice; `a` not empty."""
    if not b.any():
        return 0.0
    distance = cv2.distanceTransform((~b).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((distance[a] <= tolerance_px).mean())


def boundary_f1(lines: np.ndarray, edges: np.ndarray, tolerance_px: float = TOLERANCE_PX) -> float:
    """2PR / (P + R): P = share of edges near a line, R = share of lines near an edge. 1 when both are empty, 0 when one is."""
    if not lines.any() or not edges.any():
        return float(lines.any() == edges.any())
    precision, recall = share_near(edges, lines, tolerance_px), share_near(lines, edges, tolerance_px)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def line_f1(ink: np.ndarray, rgb: np.ndarray) -> float:
    """How well the edges of a picture follow a drawing, in [0, 1]; within 3 px at 256 px."""
    return boundary_f1(centre_lines(ink), picture_edges(rgb))


# ---- colour -----------------------------------------------------------------------------------------------------


def figure_mask(rgb: np.ndarray, contrast: float = 16) -> np.ndarray:
    """What stands out from the paper (the median of the border), with the holes filled."""
    paper = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    differs = (np.abs(rgb.astype(np.float32) - paper).max(-1) > contrast).astype(np.uint8)
    contours, _ = cv2.findContours(differs, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(differs), contours, -1, 1, cv2.FILLED).astype(bool)


def mean_lab(rgb: np.ndarray, figure: np.ndarray) -> np.ndarray:
    """Mean CIE Lab colour of the figure, [3]."""
    return cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[figure].mean(0)


def colour_shift(towards: np.ndarray, away: np.ndarray, figure: np.ndarray, colours: tuple[str, str] = ("red", "blue")) -> float:
    """How far the figure of picture `towards` lies from that of `away` along the axis of two colour words.

    In Delta E: the difference of the mean colours, projected on the direction between the pure hues in Lab's a, b plane.
    Negative when the two are swapped.
    """
    pure = [cv2.cvtColor(np.float32([[[HUES[c], 1, 1]]]), cv2.COLOR_HSV2RGB) for c in colours]
    axis = np.subtract(*(cv2.cvtColor(p, cv2.COLOR_RGB2LAB)[0, 0, 1:] for p in pure))
    change = (mean_lab(towards, figure) - mean_lab(away, figure))[1:]
    return float(change @ axis / np.linalg.norm(axis))


def nearest_colour(rgb: np.ndarray, figure: np.ndarray, colours: tuple[str, ...]) -> str | None:
    """Which of the colour words is nearest to the figure's dominant hue; None when less than a tenth of it is coloured."""
    hue, share = hue_of(rgb, figure.astype(np.uint8) * 255)
    return min(colours, key=lambda c: hue_distance(hue, HUES[c])) if share >= 0.1 else None


# ---- sharpness, diversity ---------------------------------------------------------------------------------------


def gradient_energy(rgb: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels, in units of (1/255)^2: falls with every blur."""
    x = rgb.astype(np.float32)
    return float((np.diff(x, axis=0) ** 2).mean() + (np.diff(x, axis=1) ** 2).mean())


def sharpness_ratio(made: np.ndarray, real: np.ndarray) -> float:
    """Gradient energy of generated pictures over that of the real ones they answer to. uint8 [N, H, W, 3] twice."""
    return sum(map(gradient_energy, made)) / sum(map(gradient_energy, real))


def pairwise_distance(pictures: np.ndarray) -> float:
    """Mean root-mean-square pixel distance over all pairs of [N, H, W, 3], N >= 2; 0 when all are the same."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    gram = flat @ flat.T
    square = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    above = square[np.triu_indices(len(flat), 1)]
    return float(np.sqrt(np.maximum(above, 0) / flat.shape[1]).mean())
