"""One repair of the environment, made when `sana_app` is imported.

A CUDA-built torchvision beside a CPU-only torch cannot load its compiled operators, and then stops with
"operator torchvision::nms does not exist" as soon as it describes them; diffusers, transformers and
controlnet-aux, which import it, stop with it. Declaring the two schemas it asks for lets the import pass.
The operators themselves stay absent: nothing here detects boxes.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def operators_load() -> bool:
    """Whether torchvision's compiled operators load into this torch (also True where torchvision is not installed)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return True
    libraries = [p for pattern in ("_C*.so", "_C*.pyd") for p in Path(spec.origin).parent.glob(pattern)]
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:  # a library it was built with (libcudart, libc10_cuda) is missing
        return False
    return bool(libraries)


def declare_torchvision_schemas() -> list[str]:
    """Declare what is missing, and only if it is; returns the names declared. Safe to call twice."""
    if operators_load():
        return []
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        torch.library.define(f"torchvision::{name}", SCHEMAS[name])
    return missing
