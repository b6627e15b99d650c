"""Sampling during training: the teacher's guided ODE and the student's consistency steps, both in TrigFlow form."""

from __future__ import annotations

import torch

from sana_app.model import trigflow
from sana_app.model.network import TrigFlowTeacher
from training.batches import Batch
from training.config import Config
from training.loop import Draws, device


def guided_F(teacher: TrigFlowTeacher, x: torch.Tensor, t: torch.Tensor, batch: Batch, w: torch.Tensor | float,
             scale: torch.Tensor | float = 1.0, weak: TrigFlowTeacher | None = None, weak_weight: float = 0.0) -> torch.Tensor:
    """Classifier-free guidance F_u + w·(F_c - F_u), both halves in one forward; with a `weak` teacher, an earlier state of the same
    run, also autoguidance + weak_weight·(F_c - F_weak): away from what the longer training mended (Karras et al., arXiv 2406.02507).

    x = x_t / sigma_data [B, C, h, w], t [B], w [B] or number, `scale` the conditioning scale (number or [B]).
    """
    twice = lambda a: torch.cat([a, a])
    F_c, F_u = teacher(twice(x), twice(t), torch.cat([batch.text, batch.null_text]), torch.cat([batch.mask, batch.null_mask]),
                       twice(batch.cond), twice(scale) if torch.is_tensor(scale) else scale).chunk(2)
    w = w.view(-1, 1, 1, 1) if torch.is_tensor(w) else w
    F = F_u + w * (F_c - F_u)
    if weak is not None:
        F = F + weak_weight * (F_c - weak(x, t, batch.text, batch.mask, batch.cond, scale))
    return F


def student_guidance(config: Config, draws: Draws, count: int) -> torch.Tensor:
    """Guidance scales the student is trained for, drawn at random: [count]."""
    scales = torch.tensor(config.guidance, device=device())
    return scales[(draws.uniform(count) * len(config.guidance)).long()]


def teacher_guidance(config: Config, w: torch.Tensor) -> torch.Tensor:
    """The teacher's scale where the student is given `w`: 1 + guidance_gain·(w - 1)."""
    return 1 + config.guidance_gain * (w - 1)


@torch.no_grad()
def teacher_states(teacher: TrigFlowTeacher, batch: Batch, noise: torch.Tensor, steps: int, w: torch.Tensor | float, scale: torch.Tensor | float = 1.0,
                   weak: TrigFlowTeacher | None = None, weak_weight: float = 0.0) -> torch.Tensor:
    """The deterministic ODE from `noise` (unit variance, [B, C, h, w]) in `steps` Euler steps on the arc: all states, unit variance
    [B, steps + 1, C, h, w], the clean latents last."""
    x = noise * trigflow.SIGMA_DATA
    times, states = trigflow.ode_timesteps(steps), [noise]
    for t, u in zip(times[:-1], times[1:]):
        F = guided_F(teacher, x / trigflow.SIGMA_DATA, torch.full((len(x),), t, device=x.device), batch, w, scale, weak, weak_weight)
        x = trigflow.ode_step(x, F, t, u)
        states.append(x / trigflow.SIGMA_DATA)
    return torch.stack(states, dim=1)


def sample_teacher(teacher: TrigFlowTeacher, batch: Batch, noise: torch.Tensor, steps: int, w: float, scale: float = 1.0) -> torch.Tensor:
    """Clean latents of `teacher_states`, [B, C, h, w]."""
    return teacher_states(teacher, batch, noise, steps, w, scale)[:, -1]


@torch.no_grad()
def sample_student(student: TrigFlowTeacher, batch: Batch, noises: list[torch.Tensor], w: float, scale: float = 1.0) -> torch.Tensor:
    """Consistency sampling in len(noises) steps (1, 2 or 4): unit-variance noises [B, C, h, w] -> unit-variance clean latents."""
    times = trigflow.sprint_timesteps(len(noises))
    x0 = torch.zeros_like(noises[0])
    for t, noise in zip(times[:-1], noises):
        x = trigflow.interpolate(x0, noise * trigflow.SIGMA_DATA, t)
        F = student(x / trigflow.SIGMA_DATA, torch.full((len(x),), t, device=x.device), batch.text, batch.mask, batch.cond, scale, guidance=w)
        x0 = trigflow.clean_from_F(x, F, t)
    return x0 / trigflow.SIGMA_DATA
