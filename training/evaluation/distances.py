"""FID and KID between two sets of features, through torchmetrics."""

from __future__ import annotations

import warnings

import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS, KID_SUBSET = 100, 1000  # torchmetrics' defaults; smaller sets are used whole


class Given(torch.nn.Module):
    """A feature network for torchmetrics that takes features as they are: each picture is looked at once for all numbers."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def check(real: torch.Tensor, made: torch.Tensor) -> None:
    if min(len(real), len(made)) < 2 or real.shape[1] != made.shape[1]:
        raise ValueError(f"features are {list(real.shape)} and {list(made.shape)}: wanted at least two pictures on each side, and one kind of features")


def fid(real: torch.Tensor, made: torch.Tensor) -> float:
    """Fréchet distance of the two Gaussians, |m₁ - m₂|² + tr(S₁ + S₂ - 2(S₁S₂)^½); features [N, D], [M, D]. Biased upwards in small
    sets, the more the smaller they are: compare only equal counts."""
    check(real, made)
    metric = FrechetInceptionDistance(feature=Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return float(metric.compute())


def kid(real: torch.Tensor, made: torch.Tensor, seed: int = 0) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y/D + 1)³, unbiased whatever the count (so it may fall below 0)."""
    check(real, made)
    size = min(KID_SUBSET, len(real), len(made))
    whole = size == len(real) == len(made)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns of the memory that stored features take
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=Given(real.shape[1]), subsets=1 if whole else KID_SUBSETS, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(made.double(), real=False)
        return float(metric.compute()[0])
