"""Stage 5: the one-step student, with its ControlNet (SANA-Sprint §3: sCM + LADD; the same losses distil the ControlNet).

Student and discriminator alternate step by step. The student starts as its teacher, or as the jump stage left it; nothing is drawn
twice from the same numbers; formulas are in losses.py and sana_app.model.trigflow, the discriminator in discriminator.py.

No network is wrapped in accelerate's DDP: the JVP needs the bare module, and gradients averaged once a step (optim.py) give the numbers of one
process on any number of them. Nor is diffusers' EMAModel used: it keeps a list of weights, where previews sample from a module of its own (optim.Ema).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import nn

from sana_app.model import trigflow
from sana_app.model.attention import use_explicit_softmax
from sana_app.model.network import TrigFlowTeacher, network_time
from training import monitor
from training.batches import Batch, Corpus
from training.config import Config
from training.discriminator import Discriminator
from training.distributed import refuse_fsdp
from training.loop import Draws, autocast, device, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients, layer_groups, make_optimizer
from training.losses import hinge_discriminator, hinge_generator, jvp_of_student, normalised_tangent, scm_loss, scm_tangent
from training.pair import load_jump, save_student, start_pair, trained_part, weak_teacher, with_folders
from training.sampling import guided_F, sample_student, student_guidance, teacher_guidance
from training.sheets import contact_sheet
from training.trajectories import Trajectories, make_trajectories, trajectory_loss

SIGMA_DATA = trigflow.SIGMA_DATA


class Logvar(nn.Module):
    """The sCM loss's learnt weight: a linear map of the student's time embedding. [B] -> [B].

    It starts at -log(numbers in a latent), where it ends up anyway: the tangent has length 1, so its mean square is
    1/numbers. From zero, sCM would be that much too weak beside the adversarial loss for the first thousand steps.
    """

    def __init__(self, width: int, numbers: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -math.log(numbers))

    def forward(self, transformer: SanaTransformer2DModel, t: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        config = transformer.config
        _, embedded = transformer.time_embed(network_time(trigflow.flow_time(t), config), guidance=guidance * config.guidance_embeds_scale, hidden_dtype=t.dtype)
        return self.linear(embedded.float())[:, 0]


def adversarial_times(normal: torch.Tensor, chosen: torch.Tensor, t: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(student time, discriminator time). The student's time is t_max where `chosen` ~ U(0, 1) is below `share`, else `t`;
    the discriminator's is arctan(exp(N(-0.6, 1))/sigma_data). All [B]."""
    student = torch.where(chosen < share, torch.full_like(t, trigflow.T_MAX), t)
    return student, trigflow.t_from_normal(normal, -0.6, 1.0)


class Distillation:
    """The three losses of the student, each a mean over a batch. `r` is the warm-up of the sCM tangent, `scale` [B] the
    conditioning scale (0 = without lines), `w` [B] the guidance scale; x_t, x0, z have std sigma_data."""

    def __init__(self, config: Config, teacher: TrigFlowTeacher, student: TrigFlowTeacher, disc: Discriminator, logvar: Logvar,
                 weak: TrigFlowTeacher | None = None, paths: Trajectories | None = None):
        self.config, self.teacher, self.student, self.disc, self.logvar, self.weak, self.paths = config, teacher, student, disc, logvar, weak, paths

    def consistency(self, x_t, t, w, batch: Batch, scale, r) -> torch.Tensor:
        """sCM: the student's own tangent, with the guided teacher as the field."""
        student, x = self.student, x_t / SIGMA_DATA
        with autocast(self.config):
            with torch.no_grad():
                dxdt = SIGMA_DATA * guided_F(self.teacher, x, t, batch, teacher_guidance(self.config, w), scale, self.weak, self.config.autoguidance)
                function = lambda x, t: student(x, t, batch.text, batch.mask, batch.cond, scale, w)
                F_minus, dF = jvp_of_student(function, x, t, dxdt)
                g = normalised_tangent(scm_tangent(F_minus, dF, x_t, dxdt, t, r))
            F = student(x, t, batch.text, batch.mask, batch.cond, scale, w)
        return scm_loss(F, F_minus, g, t, self.logvar(student.transformer, t, w)).mean()

    def one_step(self, x_t, t, w, batch: Batch, scale) -> torch.Tensor:
        F = self.student(x_t / SIGMA_DATA, t, batch.text, batch.mask, batch.cond, scale, w)
        return trigflow.clean_from_F(x_t, F, t)

    def judge(self, x0, z, t, batch: Batch, scale) -> torch.Tensor:
        return self.disc(trigflow.interpolate(x0, z, t) / SIGMA_DATA, t, batch.text, batch.mask, batch.cond, scale).float()

    def adversarial(self, x_t, t, z_disc, t_disc, w, batch: Batch, scale) -> torch.Tensor:
        """LADD, the student's side."""
        with autocast(self.config):
            return hinge_generator(self.judge(self.one_step(x_t, t, w, batch, scale), z_disc, t_disc, batch, scale)).mean()

    def discriminate(self, x_t, t, real, z_disc, t_disc, w, batch: Batch, scale) -> tuple[torch.Tensor, torch.Tensor]:
        """LADD, the discriminator's side, and its margin. `z_disc`, `t_disc` [2B]: first of the real ones, then of the fake; [3B] with
        misaligned pairs as further fakes: real latents, each under the caption and lines of the next sample."""
        with autocast(self.config):
            with torch.no_grad():
                judged = [real, self.one_step(x_t, t, w, batch, scale)] + [real.roll(1, 0)] * (len(z_disc) == 3 * len(real))
            repeat = lambda a: torch.cat([a] * len(judged)) if torch.is_tensor(a) else a
            # one verdict a latent: the real ones are judged once, whatever the number of fakes
            on_real, *on_fake = self.judge(torch.cat(judged), z_disc, t_disc, Batch(*map(repeat, vars(batch).values())), repeat(scale)).chunk(len(judged))
        return hinge_discriminator(on_real, torch.cat(on_fake, dim=1)).mean(), (on_real.mean() - on_fake[0].mean()).detach()

    def jump(self, paths: Trajectories, draws: Draws, corpus: Corpus) -> torch.Tensor:
        """The jump stage's loss (trajectories.py), on as many samples."""
        batch, x, t, x0, w, scale = paths.draw(local_batch(self.config.student_batch, self.config), draws, corpus)
        with autocast(self.config):
            return trajectory_loss(lambda x, t: self.student(x, t, batch.text, batch.mask, batch.cond, scale, w), x, t, x0).mean()

    def backward(self, step: int, draws: Draws, corpus: Corpus) -> dict[str, float]:
        """Gradients of one micro-batch, `draws` its own: of the student at even steps, of the discriminator at odd ones."""
        config, count = self.config, local_batch(self.config.student_batch, self.config)
        batch = corpus.draw(count, draws)
        x0, z = batch.x0 * SIGMA_DATA, draws.normal(*batch.x0.shape) * SIGMA_DATA
        t = trigflow.t_from_normal(draws.normal(count), config.scm_mean, config.scm_std)
        w = student_guidance(config, draws, count)
        no_lines = config.controlnet_no_lines if config.student_base else 0.0
        scale = (draws.uniform(count) >= no_lines).float()
        t_adv, t_disc = adversarial_times(draws.normal(count), draws.uniform(count), t, config.ladd_t_max_share)
        x_adv, z_disc = trigflow.interpolate(x0, z, t_adv), draws.normal(*x0.shape) * SIGMA_DATA
        if step % 2:
            # real and fake are re-noised with draws of their own
            renoise = lambda: (draws.normal(*x0.shape) * SIGMA_DATA, trigflow.t_from_normal(draws.normal(count), -0.6, 1.0))
            if config.ladd_misaligned and count == 1:
                raise ValueError("ladd_misaligned needs at least 2 samples in a micro-batch on each process: lower micro_batches, or raise student_batch")
            sides = [renoise(), (z_disc, t_disc)] + ([renoise()] if config.ladd_misaligned else [])
            loss, margin = self.discriminate(x_adv, t_adv, x0, *map(torch.cat, zip(*sides)), w, batch, scale)
            (loss / config.micro_batches).backward()
            return {"disc_loss": loss.item(), "margin": margin.item()}
        found = {}
        if config.scm_weight:
            # a tensor, so that compiled code does not see a new constant at every step
            r = torch.tensor(min(1.0, step / max(1, config.scm_warmup)), device=x0.device)
            loss = self.consistency(trigflow.interpolate(x0, z, t), t, w, batch, scale, r)
            (config.scm_weight / config.micro_batches * loss).backward()
            found["scm"] = loss.item()
        if config.ladd_weight:
            loss = self.adversarial(x_adv, t_adv, z_disc, t_disc, w, batch, scale)
            (config.ladd_weight / config.micro_batches * loss).backward()
            found["ladd"] = loss.item()
        if self.paths is not None:
            loss = self.jump(self.paths, draws, corpus)
            (config.jump_weight / config.micro_batches * loss).backward()
            found["jump"] = loss.item()
        return found


def train_student(config: Config, out: Path) -> None:
    """Trains, and writes OUT/student/{transformer,controlnet} with the averaged weights. What is distilled from where: pair.py."""
    refuse_fsdp(config, "forward-mode derivatives (the JVP of the consistency loss) cannot pass through shards")
    config = with_folders(config, out)
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    torch.manual_seed(config.seed)
    teacher, student = (net.to(device()) for net in start_pair(config, out))
    load_jump(config, out, student)
    use_explicit_softmax(teacher)
    use_explicit_softmax(student)
    for network in [n for net in (teacher, student) for n in net.children()] if config.checkpointing else ():
        network.enable_gradient_checkpointing()  # no part of the JVP, which runs without gradients
    trained = trained_part(config, student)
    width = student.transformer.config.num_attention_heads * student.transformer.config.attention_head_dim
    logvar = Logvar(width, held_out.latents.images[0].size).to(device())
    disc = Discriminator(teacher, config.disc_blocks).to(device())
    ema = Ema(trained, config.ema)
    average = trained_part(config, student, ema.module)
    groups = layer_groups(student, config.student_lr, config)
    groups[-1][0].extend(logvar.parameters())
    opt = make_optimizer(groups, config)
    disc_opt = make_optimizer([(list(disc.parameters()), config.student_disc_lr)], config)
    weak = weak_teacher(config, out)
    paths = make_trajectories(config, corpus, teacher, weak, out / "cache") if config.jump_paths and config.jump_weight else None
    losses = Distillation(config, teacher, student, disc, logvar, weak, paths)
    for name in ("consistency", "adversarial", "discriminate"):
        setattr(losses, name, maybe_compile(config.compile_denoiser, getattr(losses, name)))

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for part in draws.parts(config.micro_batches):
            for key, value in losses.backward(step, part, corpus).items():
                numbers[key] = numbers.get(key, 0.0) + value / config.micro_batches
        total = sum(numbers.values())  # finite if all are
        numbers |= apply_gradients(disc_opt if step % 2 else opt, step, config.student_steps, config.student_clip, config, total)
        if step % 2 == 0:
            disc_opt.zero_grad(set_to_none=True)  # the adversarial pass went through the heads
            ema.update(trained, step // 2)
        return numbers

    def preview(step: int, folder: Path) -> dict[str, float]:
        batch, draws = held_out.fixed(16), Draws(7, 0)
        noises = [draws.normal(*batch.x0.shape) for _ in range(4)]
        w = config.guidance[len(config.guidance) // 2]
        with autocast(config):
            found = [sample_student(average, batch, noises[:n], w) for n in (1, 2, 4)]
        rows = [held_out.drawings(batch), *(held_out.decode(x).cpu() for x in found), held_out.decode(batch.x0).cpu()]
        contact_sheet(torch.cat(rows), folder / f"preview-{step:06d}.png", 16)
        return {**{f"distance_{n}step": float((x - batch.x0).abs().mean()) for n, x in zip((1, 2, 4), found)},
                **monitor.check(folder, held_out, found[0], config.latent_band)}

    run("student", out, config, config.student_steps, {"student": trained, "logvar": logvar, "ema": ema, "opt": opt, "disc": disc, "disc_opt": disc_opt},
        train_step, config.student_batch, preview, corpus.pixels.hash, turns=2)
    save_student(config, out, average)
