"""Stage 4: the student's first lesson: to jump from any point of the teacher's paths to their ends (trajectories.py).

It costs a plain forward and backward pass a sample, a fifth of sCM + LADD, and gives the one-step student its colours before
those two begin. Without `jump_paths` there is no such stage and the student starts as its teacher, as published.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sana_app.model.attention import use_explicit_softmax
from training import monitor
from training.batches import Corpus
from training.config import Config
from training.distributed import is_main, refuse_fsdp
from training.loop import Draws, autocast, device, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients, layer_groups, make_optimizer
from training.pair import save_jump, start_pair, trained_part, weak_teacher, with_folders
from training.sampling import sample_student, teacher_guidance, teacher_states
from training.sheets import contact_sheet
from training.trajectories import make_trajectories, trajectory_loss


def train_jump(config: Config, out: Path) -> None:
    """Trains, and writes OUT/jump/{transformer,controlnet} with the averaged weights, from which the student stage starts."""
    if not config.jump_paths:
        if is_main():
            print("jump: no paths (jump_paths=0), the student starts as its teacher")
        return
    refuse_fsdp(config, "it starts the student, which is not sharded")
    config = with_folders(config, out)
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    torch.manual_seed(config.seed)
    teacher, student = (net.to(device()) for net in start_pair(config, out))
    use_explicit_softmax(teacher)
    use_explicit_softmax(student)
    for network in [n for net in (teacher, student) for n in net.children()] if config.checkpointing else ():
        network.enable_gradient_checkpointing()
    weak = weak_teacher(config, out)
    paths = make_trajectories(config, corpus, teacher, weak, out / "cache")
    ema = Ema(trained_part(config, student), config.ema)
    average = trained_part(config, student, ema.module)
    opt = make_optimizer(layer_groups(student, config.jump_lr, config), config)
    count = local_batch(config.jump_batch, config)

    def loss_of(x, t, x0, text, mask, cond, scale, w) -> torch.Tensor:
        with autocast(config):
            return trajectory_loss(lambda x, t: student(x, t, text, mask, cond, scale, w), x, t, x0).mean()

    loss_of = maybe_compile(config.compile_denoiser, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total = 0.0
        for part in draws.parts(config.micro_batches):
            batch, x, t, x0, w, scale = paths.draw(count, part, corpus)
            loss = loss_of(x, t, x0, batch.text, batch.mask, batch.cond, scale, w) / config.micro_batches
            loss.backward()
            total += loss.item()
        numbers = apply_gradients(opt, step, config.jump_steps, config.student_clip, config, total)
        ema.update(trained_part(config, student), step)
        return {"loss": total, **numbers}

    ends: list[torch.Tensor] = []  # the teacher's own pictures of the preview, drawn once

    def preview(step: int, folder: Path) -> dict[str, float]:
        batch, w = held_out.fixed(32), config.guidance[len(config.guidance) // 2]
        noise = config.noise_scale * Draws(7, 0).normal(*batch.x0.shape)
        with autocast(config):
            if not ends:
                ends.append(teacher_states(teacher, batch, noise, config.jump_path_steps, teacher_guidance(config, w), 1.0, weak, config.autoguidance)[:, -1].float())
            found = sample_student(average, batch, [noise], w).float()
        rows = [held_out.drawings(batch), *(held_out.decode(x).cpu() for x in (found, ends[0], batch.x0))]
        contact_sheet(torch.cat([row[:16] for row in rows]), folder / f"preview-{step:06d}.png", 16)
        return {"distance_teacher": float((found - ends[0]).abs().mean()), "distance": float((found - batch.x0).abs().mean()),
                **monitor.check(folder, held_out, found, config.latent_band)}

    run("jump", out, config, config.jump_steps, {"student": trained_part(config, student), "ema": ema, "opt": opt}, train_step, config.jump_batch, preview, corpus.pixels.hash)
    save_jump(config, out, average)
