"""What a ControlNet can follow: line drawings, Canny or HED edges, depth, or pictures of the user's own.

A condition is a raster uint8 [H, W] (255 = line, or near) or [H, W, 3]; the model sees it in [-1, 1], white lines on black.
HED and depth come from pretrained networks (package controlnet-aux), which are imported and loaded only when asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from sana_app.model.folder import read_json, write_json
from training.distributed import is_main

CONDITIONS = ("lines", "canny", "hed", "depth", "own")
DETECTOR_WEIGHTS = "lllyasviel/Annotators"  # hub repository with both files
DETECTOR_FILES = {"hed": "ControlNetHED.pth", "depth": "dpt_hybrid-midas-501f0c75.pt"}
CONDITION_FILE = "condition.json"               # beside a ControlNet's weights: what it follows


def write_condition(controlnet: Path, kind: str) -> None:
    """Puts down in a ControlNet's folder what it follows. The main process writes."""
    if is_main():
        write_json(controlnet / CONDITION_FILE, {"condition": kind})


def check_condition(controlnet: Path, kind: str) -> None:
    """ValueError where the ControlNet in that folder follows something else than the recipe makes of the pictures: trained on the wrong
    rasters it would learn to look away. A folder without the file (published, or older than it) is taken as it is."""
    if not (controlnet / CONDITION_FILE).is_file():
        return
    found = read_json(controlnet / CONDITION_FILE).get("condition")
    if found != kind:
        raise ValueError(f"condition={kind}, but the ControlNet at {controlnet} follows {found}: --set condition={found}")


def condition_key(kind: str, weights: str = "") -> str:
    """The name that the pixel cache knows the condition by. Only another network than the usual one adds to it, by its content, so that
    the caches of all other conditions keep their names."""
    if kind not in DETECTOR_FILES or weights in ("", DETECTOR_WEIGHTS):
        return kind
    file = Path(weights) / DETECTOR_FILES[kind]
    if not file.is_file():
        return f"{kind} {weights}"  # a hub repository
    h = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            h.update(block)
    return f"{kind} {h.hexdigest()[:16]}"


def canny(image: np.ndarray) -> np.ndarray:
    """Canny edges of RGB [H, W, 3] uint8 -> uint8 [H, W]. Thresholds by the picture's own contrast, so that dim pictures have edges
    too: the upper one is Otsu's threshold of the gradient's length, the lower 0.4 times it. `floor` keeps plain grain out."""
    floor = 30.0  # a step of about 15 grey levels, in units of the 3x3 Sobel filter on the blurred picture
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    dx, dy = (cv2.Sobel(grey, cv2.CV_16S, *order) for order in ((1, 0), (0, 1)))
    length = np.hypot(dx.astype(np.float32), dy.astype(np.float32))
    largest = max(float(length.max()), 1.0)
    split = cv2.threshold(np.round(length * (255 / largest)).astype(np.uint8), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]
    high = max(floor, split * largest / 255)
    return cv2.Canny(dx, dy, 0.4 * high, high, L2gradient=True)


def load_detector(kind: str, weights: str) -> Callable[[np.ndarray], np.ndarray]:
    """HED edges or depth of RGB [H, W, 3] uint8 -> uint8 [H, W]; `weights`: folder or hub repository, "" = the usual one.
    ValueError says what is missing and what works without it."""
    weights = weights or DETECTOR_WEIGHTS
    help_text = "canny needs no network, and own takes conditions you have made yourself (NAME.cond.png beside NAME.png)"
    try:
        from controlnet_aux import HEDdetector, MidasDetector
    except ImportError as error:
        raise ValueError(f"condition={kind} needs controlnet-aux ({error}): pip install --no-deps controlnet-aux timm einops; {help_text}") from error
    try:
        network = (HEDdetector if kind == "hed" else MidasDetector).from_pretrained(weights)
    except Exception as error:  # offline, no such file, no space: the hub client raises many kinds
        raise ValueError(f"condition={kind}: the network's weights could not be had from {weights} "
                         f"({type(error).__name__}: {str(error)[:200]}). Go online once, or set condition_weights to a folder with them; {help_text}") from error
    import torch
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")

    def detect(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        found = network(image, detect_resolution=min(height, width), image_resolution=min(height, width), output_type="np")
        found = found[..., 0] if found.ndim == 3 else found
        return cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR)  # the networks round sides to multiples of 64
    return detect


def condition_maker(kind: str, weights: str = "") -> Callable | None:
    """A function for the pixel cache, (sample, fitted picture, fit) -> list of rasters of the picture's size; None = line drawings,
    which the cache has or draws itself."""
    if kind not in CONDITIONS:
        raise ValueError(f"condition={kind!r}: wanted one of {', '.join(CONDITIONS)}")
    if kind == "lines":
        return None
    if kind == "own":
        def own(sample, image: np.ndarray, fit: Callable) -> list[np.ndarray]:
            if not sample.conds:
                raise ValueError(f"condition=own, but {sample.key} has no {sample.key}.cond.png beside its picture")
            for cond in sample.conds:
                if cond.shape[:2] != sample.image.shape[:2]:
                    raise ValueError(f"{sample.key}.cond.png is {cond.shape[1]}x{cond.shape[0]}, its picture {sample.image.shape[1]}x"
                                     f"{sample.image.shape[0]}: they must lie on each other pixel by pixel")
            return [fit(cond) for cond in sample.conds]
        return own
    loaded: list[Callable] = [canny] if kind == "canny" else []

    def detected(sample, image: np.ndarray, fit: Callable) -> list[np.ndarray]:
        if not loaded:  # on the first picture only: a finished cache needs no network
            loaded.append(load_detector(kind, weights))
        return [loaded[0](np.ascontiguousarray(image))]
    return detected
