"""Loss weights for parts of a picture: faces and hands are small, and the first thing a person looks at.

Boxes stand beside the picture, in NAME.json: {"regions": [{"box": [x0, y0, x1, y1], "kind": "face", "weight": 2.0}]}, in px of the
picture, or a detector finds them: any function RGB uint8 [H, W, 3] -> such a list, named in the recipe as module:function.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

Detector = Callable[[np.ndarray], list[dict]]


def check_regions(regions: object, name: str) -> list[dict]:
    """`regions` as they stand in a file; ValueError says which is wrong, and what was wanted."""
    if not isinstance(regions, list):
        raise ValueError(f"{name}: regions is a {type(regions).__name__}, wanted a list like [{{\"box\": [x0, y0, x1, y1], \"kind\": \"face\"}}]")
    for region in regions:
        box, weight = (region.get("box"), region.get("weight", 1.0)) if isinstance(region, dict) else (None, 1.0)
        numbers = [*box, weight] if isinstance(box, (list, tuple)) and len(box) == 4 else []
        if not numbers or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers) or box[0] >= box[2] or box[1] >= box[3] or weight < 0:
            raise ValueError(f"{name}: region {region!r}: wanted \"box\": [x0, y0, x1, y1] in px with x0 < x1 and y0 < y1, and \"weight\" of at least 0")
    return regions


def load_detector(name: str) -> Detector | None:
    """The function that `name` ("module:function") names; None for "". ValueError says what could not be found."""
    if not name:
        return None
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"region_detector={name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"region_detector={name!r}: wanted module:function, as training.regions:faces")
    return found


@lru_cache(maxsize=1)
def _cascade():
    from skimage import data
    from skimage.feature import Cascade
    return Cascade(data.lbp_frontal_face_cascade_filename())


def faces(image: np.ndarray) -> list[dict]:
    """Frontal faces of RGB uint8 [H, W, 3], found by scikit-image's cascade of local binary patterns, which needs no download.

    It is quick and coarse: it misses profiles and small faces (under a tenth of the shorter side), and sees one now and then where
    there is none. OpenCV 5 ships no cascade; its YuNet (cv2.FaceDetectorYN) needs a model file of its own.
    """
    shrink = max(1, min(image.shape[:2]) // 400)  # its time goes with the pixels, and a face of 40 px is enough
    small = np.ascontiguousarray(image[::shrink, ::shrink])
    side = min(small.shape[:2])
    found = _cascade().detect_multi_scale(img=small, scale_factor=1.2, step_ratio=1.0, min_size=(max(24, side // 10),) * 2, max_size=(side, side))
    return [{"box": [shrink * f["c"], shrink * f["r"], shrink * (f["c"] + f["width"]), shrink * (f["r"] + f["height"])], "kind": "face"} for f in found]


def weight_map(regions: list[dict], height: int, width: int, default: float) -> np.ndarray:
    """Loss weights on the latent grid, float32 [height, width] of mean 1: a picture with boxes counts as much as any other.

    `regions`: boxes in parts of the picture, 0 to 1; one without a weight has `default`. A cell that a box of weight w covers to the
    part c weighs 1 + c·(w - 1) before the mean is divided out; where boxes overlap, the one furthest from 1 counts.
    """
    extra = np.zeros((height, width))
    for region in regions:
        x0, y0, x1, y1 = region["box"]
        cover = lambda a, b, n: np.clip(np.minimum(b * n, np.arange(1, n + 1)) - np.maximum(a * n, np.arange(n)), 0, 1)
        found = np.outer(cover(y0, y1, height), cover(x0, x1, width)) * (float(region.get("weight", default)) - 1)
        extra = np.where(np.abs(found) > np.abs(extra), found, extra)
    found = 1 + extra
    return (found / found.mean()).astype(np.float32) if found.any() else np.ones((height, width), np.float32)
