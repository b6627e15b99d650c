"""The two losses of SANA-Sprint: continuous-time consistency (sCM) and latent adversarial (LADD). One number a sample.

x_t, x0, z have std sigma_data; t [B] is the TrigFlow angle; F is a network output in TrigFlow form, [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch.autograd import forward_ad

from sana_app.model.trigflow import SIGMA_DATA


def tangent_directions(dxdt: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Direction of the JVP at (x_t/sigma_data, t): (cos t·sin t·dxdt/sigma_data, cos t·sin t). It carries cos·sin from the
    start, so that nothing is 0·infinity at pi/2 (sCM, arXiv 2410.11081, §4.1)."""
    cs = torch.cos(t) * torch.sin(t)
    return cs.view(-1, 1, 1, 1) * dxdt / SIGMA_DATA, cs


def scm_tangent(F_minus: torch.Tensor, dF: torch.Tensor, x_t: torch.Tensor, dxdt: torch.Tensor, t: torch.Tensor, r: float) -> torch.Tensor:
    """g = -cos²t·(sigma_data·F⁻ - dxdt) - r·(cos t·sin t·x_t + sigma_data·dF), not yet normalised (SANA-Sprint eq. 11).

    `dF` is the JVP along `tangent_directions`; r in [0, 1] is the warm-up of the unstable second part.
    """
    cos, sin = torch.cos(t).view(-1, 1, 1, 1), torch.sin(t).view(-1, 1, 1, 1)
    return -cos ** 2 * (SIGMA_DATA * F_minus - dxdt) - r * (cos * sin * x_t + SIGMA_DATA * dF)


def normalised_tangent(g: torch.Tensor, c: float = 0.1) -> torch.Tensor:
    """g / (‖g‖ + c), the norm over (C, h, w)."""
    return g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + c)


def scm_loss(F: torch.Tensor, F_minus: torch.Tensor, g: torch.Tensor, t: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """|F - F⁻ - g|²·weight/exp(logvar) + logvar, weight = 1/(sigma_data·tan t): [B] (sCM algorithm 1).

    F⁻ + g is a constant: the gradient of the squared distance is -g. `logvar` [B]. cos/sin stands for 1/tan, which keeps
    t = pi/2 finite (weight 0).
    """
    weight = torch.cos(t) / (SIGMA_DATA * torch.sin(t))
    error = (F - (F_minus + g).detach()).square().mean(dim=(1, 2, 3))
    return weight / torch.exp(logvar) * error + logvar


def jvp_of_student(student: Callable, x: torch.Tensor, t: torch.Tensor, dxdt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(F⁻, dF) of `student(x, t)` at x = x_t/sigma_data along `tangent_directions`, without gradients.

    Forward-mode AD does not pass flash attention: put the explicit softmax on the student first. DDP does not see it.
    Dual numbers give what torch.func.jvp gives in four fifths of its time (measured on the CPU), but do not compile.
    """
    directions = tangent_directions(dxdt, t)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return torch.func.jvp(student, (x, t), directions)
        with forward_ad.dual_level():
            F, dF = forward_ad.unpack_dual(student(*map(forward_ad.make_dual, (x, t), directions)))
            return F, torch.zeros_like(F) if dF is None else dF


def hinge_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """½[relu(1 - D(real)) + relu(1 + D(fake))] over all tokens and heads: logits [B, K] twice -> [B]."""
    return 0.5 * (nnf.relu(1 - real).mean(dim=1) + nnf.relu(1 + fake).mean(dim=1))


def hinge_generator(fake: torch.Tensor) -> torch.Tensor:
    """-D(fake): logits [B, K] -> [B]."""
    return -fake.mean(dim=1)
