"""TrigFlow maths: the noising path, flow matching <-> TrigFlow, the ODE step, the time schedules.

Notation: x0 clean latent and z noise, both with std sigma_data; t angle in radians, 0 = data, pi/2 = noise;
s flow time in [0, 1]; F network output in TrigFlow form; v flow velocity of unit-variance latents.
Sources: sCM (arXiv 2410.11081) for the path, SANA-Sprint (arXiv 2503.09641 v4, eq. 6-8) for the conversion.

Every function is pure and broadcasts a time of shape [B] (or a number) against latents of shape [B, C, H, W].
"""

import math

import torch
from torch import Tensor

SIGMA_DATA = 0.5
# Exactly pi/2. The 1.57080 found in public configs lies past it: s > 1, tan t = -272242.
T_MAX = math.pi / 2


def expand_to(t: Tensor | float, x: Tensor) -> Tensor:
    """t [B] or a number -> [B, 1, 1, ...] with as many axes as x, in x's device and at least float32."""
    if not torch.is_tensor(t):
        t = torch.tensor(t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


# ---- the path ---------------------------------------------------------------------------------------------------


def interpolate(x0: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
    """x_t = cos t * x0 + sin t * z."""
    t = expand_to(t, x0)
    return torch.cos(t) * x0 + torch.sin(t) * z


def velocity(x0: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
    """dx_t/dt = cos t * z - sin t * x0, which is sigma_data * F of a perfect network."""
    t = expand_to(t, x0)
    return torch.cos(t) * z - torch.sin(t) * x0


# ---- flow matching <-> TrigFlow (SANA-Sprint eq. 6-8) -----------------------------------------------------------


def flow_time(t: Tensor) -> Tensor:
    """s = sin t / (sin t + cos t): the flow time with the same signal-to-noise ratio as the angle t."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def trigflow_time(s: Tensor) -> Tensor:
    """t = arctan(s / (1 - s)), the inverse of flow_time; atan2 keeps s = 1 finite."""
    return torch.atan2(s, 1 - s)


def flow_scale(s: Tensor) -> Tensor:
    """lambda = sqrt(s^2 + (1-s)^2) = 1 / (sin t + cos t): the length of the flow path's two coefficients."""
    return torch.sqrt(s**2 + (1 - s) ** 2)


def flow_input(x_t: Tensor, t: Tensor | float, sigma_data: float = SIGMA_DATA) -> Tensor:
    """x_s = lambda * x_t / sigma_data, what the flow network sees. Pass sigma_data=1 if x_t is already divided."""
    return flow_scale(flow_time(expand_to(t, x_t))) * (x_t / sigma_data)


def flow_output_to_F(v: Tensor, x_s: Tensor, s: Tensor | float) -> Tensor:
    """F = [(1-2s) x_s + (1-2s+2s^2) v] / lambda (eq. 8)."""
    s = expand_to(s, x_s)
    return ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * v) / flow_scale(s)


def F_to_flow_output(F: Tensor, x_s: Tensor, s: Tensor | float) -> Tensor:
    """v = [lambda F - (1-2s) x_s] / (1-2s+2s^2), the inverse of flow_output_to_F."""
    s = expand_to(s, x_s)
    return (flow_scale(s) * F - (1 - 2 * s) * x_s) / (1 - 2 * s + 2 * s**2)


# ---- steps ------------------------------------------------------------------------------------------------------


def ode_step(x_t: Tensor, F: Tensor, t: Tensor | float, u: Tensor | float, sigma_data: float = SIGMA_DATA) -> Tensor:
    """x_u = cos(t-u) * x_t - sin(t-u) * sigma_data * F: from angle t to u along the arc that F points to."""
    angle = expand_to(t, x_t) - expand_to(u, x_t)
    return torch.cos(angle) * x_t - torch.sin(angle) * (sigma_data * F)


def clean_from_F(x_t: Tensor, F: Tensor, t: Tensor | float, sigma_data: float = SIGMA_DATA) -> Tensor:
    """x0 = cos t * x_t - sin t * sigma_data * F: the ODE step to u = 0, and the consistency function."""
    return ode_step(x_t, F, t, 0.0, sigma_data)


# ---- times ------------------------------------------------------------------------------------------------------


def sprint_timesteps(num_steps: int) -> list[float]:
    """The paper's angles for 1, 2 or 4 consistency steps, num_steps + 1 values from noise to 0.

    The stock scheduler's default for 4 steps is a linspace and gives other pictures: hand it this list.
    """
    times = {
        1: [T_MAX, 0.0],
        2: [math.atan(400.0), 1.3, 0.0],
        4: [math.atan(400.0), 1.3, 1.1, 0.6, 0.0],
    }
    if num_steps not in times:
        raise ValueError(f"no published times for {num_steps!r} steps: use 1, 2 or 4, or give the angles as a list")
    return times[num_steps]


def ode_timesteps(num_steps: int) -> list[float]:
    """num_steps + 1 evenly spaced angles from pi/2 to 0, for the deterministic ODE sampler."""
    return [T_MAX * (1 - i / num_steps) for i in range(num_steps)] + [0.0]


def t_from_normal(normal: Tensor, mean: float, std: float, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Training times: tau = exp(mean + std * normal), t = arctan(tau / sigma_data), for normal ~ N(0, 1) of any shape."""
    return torch.arctan(torch.exp(mean + std * normal) / sigma_data)
