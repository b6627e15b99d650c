"""Flow matching: the path, the training times, the loss (maths: x_s = (1-s)·x0 + s·z, v = z - x0, unit-variance latents)."""

from __future__ import annotations

import torch


def shifted_time(normal: torch.Tensor, shift: float) -> torch.Tensor:
    """s = sigmoid(normal), then the resolution shift s <- shift·s / (1 + (shift-1)·s); normal ~ N(0, 1) [B] -> [B] in (0, 1)."""
    s = torch.sigmoid(normal)
    return shift * s / (1 + (shift - 1) * s)


def resolution_shift(size_px: int) -> float:
    """The flow shift NVlabs' published configurations train with: 1 at 256 px, 3 from 512 to 2048 px, 6 at 4096 px. Larger pictures
    need more noise for the same uncertainty (SD3, arXiv 2403.03206, eq. 23)."""
    return 1.0 if size_px < 512 else 3.0 if size_px < 4096 else 6.0


def flow_path(x0: torch.Tensor, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_s = (1-s)·x0 + s·z; x0, z [B, C, h, w], s [B]."""
    s = s.view(-1, 1, 1, 1)
    return (1 - s) * x0 + s * z


def flow_loss(v: torch.Tensor, x0: torch.Tensor, z: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """weight·|v - (z - x0)|², mean over a sample: [B, C, h, w] three times, weights of mean 1 [B, 1, h, w] (regions.py) -> [B]."""
    error = (v.float() - (z - x0)).square()
    return (error if weight is None else weight * error).mean(dim=(1, 2, 3))
