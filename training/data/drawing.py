"""Line drawings like a person's, from a picture with a known silhouette.

A drawing is made in three steps: edges at a chosen level of detail, strokes along them, and a hand that is not steady
(wobble, gaps, missing strokes, pens of different width, a small shift). Everything random comes from `rng`.
"""

from __future__ import annotations

import cv2
import numpy as np

LEVELS = ("outline", "regions", "strong", "full")


def silhouette(alpha: np.ndarray) -> np.ndarray:
    """Alpha [H, W] uint8 -> one-pixel contour of the figure, bool [H, W]."""
    mask = (alpha > 100).astype(np.uint8)
    mask = np.pad(mask, 1)
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8))
    return (mask - inner)[1:-1, 1:-1].astype(bool)


def region_edges(rgb: np.ndarray, colours: int, rng: np.random.Generator) -> np.ndarray:
    """Borders between flat colour regions (k-means in Lab after a median blur), bool [H, W]: ignores soft shading."""
    lab = cv2.cvtColor(cv2.medianBlur(rgb, 7), cv2.COLOR_RGB2LAB).astype(np.float32)
    samples = lab.reshape(-1, 3)[rng.integers(0, lab.shape[0] * lab.shape[1], 600)]
    cv2.setRNGSeed(int(rng.integers(1 << 30)))
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 8, 1.0)
    centres = cv2.kmeans(samples, colours, None, criteria, 1, cv2.KMEANS_PP_CENTERS)[2]
    distance = ((lab[:, :, None] - centres[None, None]) ** 2).sum(-1)
    labels = cv2.medianBlur(distance.argmin(-1).astype(np.uint8), 7)
    edges = np.zeros(labels.shape, bool)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    return edges


def canny_edges(rgb: np.ndarray, blur: float, low: float) -> np.ndarray:
    """Canny on the blurred picture, bool [H, W]; `low` is the lower threshold, the upper is 2.5 times it."""
    soft = cv2.GaussianBlur(rgb, (0, 0), blur)
    return cv2.Canny(soft, low, 2.5 * low, L2gradient=True) > 0


def find_edges(rgb: np.ndarray, alpha: np.ndarray, level: str, rng: np.random.Generator) -> np.ndarray:
    """Edges of one level of detail, bool [H, W]. `rgb` is the picture over white."""
    outline = silhouette(alpha)
    if level == "outline":
        return outline
    if level == "regions":
        return outline | region_edges(rgb, int(rng.integers(3, 6)), rng)
    if level == "strong":
        return outline | canny_edges(rgb, rng.uniform(1.6, 2.4), rng.uniform(35, 60))
    if level == "full":
        return outline | canny_edges(rgb, rng.uniform(1.0, 1.5), rng.uniform(14, 30))
    raise ValueError(f"unknown level {level!r}; wanted one of {LEVELS}")


def smooth_field(shape: tuple[int, int], cell: int, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random displacement [H, W, 2] in px, about `amplitude` rms: both sides of a traced line move together."""
    height, width = shape
    grid = rng.normal(size=(height // cell + 3, width // cell + 3, 2)).astype(np.float32) * amplitude
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def trace(edges: np.ndarray, shortest: int, missing: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Edges -> strokes (arrays [n, 2] of x, y). Pieces shorter than `shortest` px go, and a share `missing` of the rest."""
    thick = cv2.dilate(edges.astype(np.uint8), np.ones((2, 2), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(thick, connectivity=8)
    keep = np.zeros(count, np.uint8)
    sizes = np.maximum(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    keep[1:] = sizes[1:] >= shortest
    lost = rng.random(count) < missing
    if count > 1:
        lost[1 + int(np.argmax(sizes[1:]))] = False  # nobody forgets the largest stroke
    keep[lost] = 0
    contours, _ = cv2.findContours(keep[labels], cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return [c[:, 0].astype(np.float32) for c in contours if len(c) > 3]


def draw(strokes: list[np.ndarray], shape: tuple[int, int], width: float, rng: np.random.Generator,
         wobble: float, corner: float, gaps: int) -> np.ndarray:
    """Strokes -> ink [H, W] uint8 with a pen of `width` px, wobble rms `wobble` px, polyline tolerance `corner` px."""
    field = smooth_field(shape, int(rng.integers(20, 48)), wobble, rng)
    ink = np.zeros(shape, np.uint8)
    shift = 4  # cv2 draws with 1/16 px coordinates
    for points in strokes:
        points = cv2.approxPolyDP(points[:, None], corner, True)[:, 0] if corner > 0 else points
        xs = np.clip(points[:, 0].astype(int), 0, shape[1] - 1)
        ys = np.clip(points[:, 1].astype(int), 0, shape[0] - 1)
        moved = ((points + field[ys, xs]) * (1 << shift)).round().astype(np.int32)
        pen = max(1, int(round(width - 1 + rng.normal() * 0.25)))
        cv2.polylines(ink, [moved], True, 255, pen, cv2.LINE_AA, shift)
    for _ in range(gaps):
        ys, xs = np.nonzero(ink)
        if len(xs) == 0:
            break
        at = int(rng.integers(len(xs)))
        cv2.circle(ink, (int(xs[at]), int(ys[at])), int(rng.integers(3, 9)), 0, -1, cv2.LINE_AA)
    return ink


def line_drawing(rgb: np.ndarray, alpha: np.ndarray, rng: np.random.Generator, level: str | None = None) -> np.ndarray:
    """A drawing of `rgb` [H, W, 3] uint8 (over white) with silhouette `alpha` [H, W] uint8 -> ink [H, W] uint8.

    Lengths are chosen for 256 px and scale with the picture. `level` None draws one at random, mostly with detail.
    """
    scale = rgb.shape[0] / 256
    level = level or str(rng.choice(LEVELS, p=(0.1, 0.3, 0.35, 0.25)))
    edges = find_edges(rgb, alpha, level, rng)
    careful = rng.random() < 0.4  # some people trace, some scribble
    strokes = trace(edges, int(rng.integers(8, 26) * scale), 0.0 if careful else rng.uniform(0, 0.12), rng)
    ink = draw(strokes, edges.shape, rng.uniform(2.0, 5.5) * scale, rng,
               wobble=(0.3 if careful else rng.uniform(0.6, 2.2)) * scale,
               corner=(0.0 if careful else rng.uniform(0.5, 2.0)) * scale,
               gaps=0 if careful else int(rng.integers(0, 7)))
    if rng.random() < 0.5:
        dx, dy = rng.uniform(-1.5, 1.5, 2) * scale
        move = np.float32([[1, 0, dx], [0, 1, dy]])
        ink = cv2.warpAffine(ink, move, edges.shape[::-1])
    return ink
