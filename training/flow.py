"""Flow matching: the path, the training times, the loss (maths: x_s = (1-s)·x0 + s·z, v = z - x0, unit-variance latents)."""

from __future__ import annotations

import torch


def shifted_time(normal: torch.Tensor, shift: float) -> torch.Tensor:
    """s = sigmoid(normal), then the resolution shift s <- shift·s / (1 + (shift-1)·s); normal ~ N(0, 1) [B] -> [B] in (0, 1)."""
    s = torch.sigmoid(normal)
    return shift * s / (1 + (shift - 1) * s)


def flow_path(x0: torch.Tensor, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_s = (1-s)·x0 + s·z; x0, z [B, C, h, w], s [B]."""
    s = s.view(-1, 1, 1, 1)
    return (1 - s) * x0 + s * z


def flow_loss(v: torch.Tensor, x0: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """|v - (z - x0)|², mean over a sample: [B, C, h, w] three times -> [B]."""
    return (v.float() - (z - x0)).square().mean(dim=(1, 2, 3))
