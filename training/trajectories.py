"""Teacher trajectories for the student: pictures the teacher draws once, kept with the states on their way, and the regression on them.

A step of sCM learns one point of one path, from its tangent, at the price of some fifteen forward passes. Where the teacher's
paths are nearly straight (six steps give the picture of sixteen) it is cheaper to walk them once and to learn, many times over,
to jump from any of their points to their end: knowledge distillation (Luhman & Luhman, arXiv 2101.02388) with the inner
points as further starts. It gives the student its colours; sCM + LADD follow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sana_app.model import trigflow
from sana_app.model.network import TrigFlowTeacher
from training.batches import Batch, Corpus, encoder_key, weights_hash
from training.config import Config
from training.data.cache import digest, once
from training.data.rows import Rows
from training.distributed import main_first
from training.loop import Draws, autocast, device
from training.sampling import student_guidance, teacher_guidance, teacher_states

GROUP = 32   # paths that are drawn together, and a file of the cache
START = 0.5  # share of samples that jump from pure noise; the others start from a point on the way


@dataclass
class Trajectories:
    """states [N, steps+1, C, h, w]: unit-variance latents from noise to picture; what they were drawn with: pictures and
    drawings by number, captions, guidance `w` [N] and conditioning scale [N]."""

    states: Rows
    shelf: np.ndarray
    rows: np.ndarray
    inks: np.ndarray
    captions: list[str]
    w: np.ndarray
    scale: np.ndarray

    def draw(self, count: int, draws: Draws, corpus: Corpus) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> batch, x_t/sigma_data [B, C, h, w], t [B], the paths' ends x0/sigma_data [B, C, h, w], w [B], conditioning scale [B]."""
        rng, total = draws.numpy, count * draws.world
        chosen = np.flatnonzero(self.shelf == self.shelf[rng.integers(len(self.shelf))])  # one shape a batch
        chosen = chosen[rng.integers(len(chosen), size=total)]
        steps = self.states.shape[1] - 1
        points = np.where(rng.random(total) < START, 0, rng.integers(steps, size=total))
        mine = draws.mine(count)
        chosen, points = chosen[mine], points[mine]
        paths = torch.from_numpy(self.states[chosen].astype(np.float32))
        batch = corpus.gather(self.rows[chosen], self.inks[chosen], [self.captions[i] for i in chosen], int(self.shelf[chosen[0]]))
        t = torch.tensor(trigflow.ode_timesteps(steps))[points]
        x, x0 = paths[torch.arange(count), points], paths[:, -1]
        return (batch, *(a.to(device()) for a in (x, t, x0, torch.from_numpy(self.w[chosen]), torch.from_numpy(self.scale[chosen]))))


# what decides which pictures, drawings and captions a path is drawn with, and how it is walked
PATH_SETTINGS = ("seed", "data", "balance", "toned_weight", "caption_dropout", "controlnet_no_lines", "student_base", "noise_scale", "precision",
                 "jump_path_steps", "guidance", "guidance_gain", "autoguidance")


def make_trajectories(config: Config, corpus: Corpus, teacher: TrigFlowTeacher, weak: TrigFlowTeacher | None, cache: Path) -> Trajectories:
    """The recipe's trajectories, from the cache as far as they are there; a stopped run goes on at the group it was in. A dry run
    gets paths of zeros."""
    if config.dry_run:
        about = _draw_group(config, corpus, 0)[-1]
        shape = corpus.shelves[about["shelf"]].latents.images.shape[1:]
        return _joined([(np.zeros((GROUP, config.jump_path_steps + 1, *shape), np.float16), about)])
    networks = [weights_hash(n) for n in (corpus.vae, teacher, weak) if n is not None]
    key = digest(*networks, *(shelf.pixels.hash for shelf in corpus.shelves), encoder_key(config), repr([getattr(config, name) for name in PATH_SETTINGS]))
    parts = [cache / f"trajectories-{key}" / f"{i:05d}" for i in range(-(-config.jump_paths // GROUP))]
    with main_first():
        missing = [i for i, part in enumerate(parts) if not part.exists()]
        for i in tqdm(missing, desc="trajectories", unit_scale=GROUP, unit=" pictures", mininterval=2, disable=not missing):
            once(parts[i], lambda temporary: _write_group(config, corpus, teacher, weak, i, temporary))
    return _joined([(part / "states.npy", json.loads((part / "about.json").read_text())) for part in parts])


def _joined(groups: list[tuple[Path | np.ndarray, dict]]) -> Trajectories:
    of = lambda name: [value for _, about in groups for value in about[name]]
    return Trajectories(Rows([(states, GROUP) for states, _ in groups]), np.repeat([about["shelf"] for _, about in groups], GROUP), np.array(of("rows")),
                        np.array(of("inks")), of("captions"), np.array(of("w"), np.float32), np.array(of("scale"), np.float32))


def _draw_group(config: Config, corpus: Corpus, number: int) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Batch, first noise, w and conditioning scale of that group, and all but the noise as JSON: a function of the seed and the
    number alone, on any number of processes."""
    draws = Draws(config.seed + 1, number)
    batch = corpus.draw(GROUP, draws)
    w = student_guidance(config, draws, GROUP)
    scale = (draws.uniform(GROUP) >= (config.controlnet_no_lines if config.student_base else 0.0)).float()
    # half of them start from as much noise as the shipped folder will (sampling.json), half from all of it
    spread = torch.where(draws.uniform(GROUP) < 0.5, config.noise_scale, 1.0)
    noise = draws.normal(*batch.x0.shape) * spread.view(-1, 1, 1, 1)
    return batch, noise, w, scale, {"shelf": batch.shelf, "rows": batch.rows.tolist(), "inks": batch.inks.tolist(), "captions": batch.captions,
                                    "w": w.tolist(), "scale": scale.tolist()}


@torch.no_grad()
def _write_group(config: Config, corpus: Corpus, teacher: TrigFlowTeacher, weak: TrigFlowTeacher | None, number: int, folder: Path) -> None:
    batch, noise, w, scale, about = _draw_group(config, corpus, number)
    with autocast(config):
        states = teacher_states(teacher, batch, noise, config.jump_path_steps, teacher_guidance(config, w), scale, weak, config.autoguidance)
    with np.errstate(over="ignore"):
        states = states.float().cpu().numpy().astype(np.float16)
    if not np.isfinite(states).all():  # kept, it would spoil every batch that it is in
        raise FloatingPointError(f"trajectories: group {number} is not finite in half precision (largest value {np.abs(states).max():g}): the teacher is broken, "
                                 "or its guidance too strong (guidance, guidance_gain, autoguidance)")
    np.save(folder / "states.npy", states)
    (folder / "about.json").write_text(json.dumps(about))


def trajectory_loss(jump: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Distance of the student's jump from the path's end; x, x0 in units of sigma_data, [B, C, h, w], t [B]; `jump`(x, t) = F. -> [B].

    Absolute beyond 0.1 and squared below: where the end is uncertain the median is one of the colours, the mean a mud of them.
    """
    end = trigflow.clean_from_F(x * trigflow.SIGMA_DATA, jump(x, t).float(), t) / trigflow.SIGMA_DATA
    return F.smooth_l1_loss(end, x0, beta=0.1, reduction="none").mean(dim=(1, 2, 3))
