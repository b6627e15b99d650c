"""Stage 2: the flow-matching teacher, text to image, with qk-norm and a time embedding that sees [0, 1] (SANA-Sprint §3.1).

From nothing, in the recipe's shape; or, with `base`, from a published SANA checkpoint, all weights trained from the first step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel

from sana_app.model.attention import use_explicit_softmax
from sana_app.model.network import TrigFlowTeacher, predict_flow
from training import monitor
from training.base import check_fits, load_transformer, report_changes, save_folder, set_latent_size, teacher_from_base, with_base
from training.batches import Corpus
from training.config import Config
from training.distributed import shard_model
from training.flow import flow_loss, flow_path, resolution_shift, shifted_time
from training.loop import Draws, autocast, device, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients
from training.optim import layer_groups, make_optimizer
from training.sampling import sample_teacher
from training.sheets import contact_sheet


def build_teacher(config: Config, channels: int, sample_size: int, text_channels: int) -> SanaTransformer2DModel:
    """A stock SANA transformer with qk-norm and timestep_scale 0.001, shaped by the recipe: latents [channels, sample_size,
    sample_size], text states of `text_channels`."""
    width = 32 * config.heads
    return SanaTransformer2DModel(
        in_channels=channels, out_channels=channels, sample_size=sample_size, patch_size=1,
        num_attention_heads=config.heads, attention_head_dim=32, num_layers=config.layers,
        num_cross_attention_heads=config.cross_heads, cross_attention_head_dim=width // config.cross_heads, cross_attention_dim=width,
        caption_channels=text_channels, qk_norm="rms_norm_across_heads", timestep_scale=0.001, guidance_embeds=False,
        interpolation_scale=config.interpolation_scale or 1.0)  # positions: with 64 tokens they are learnt sooner than through padding alone


def latent_shape(config: Config, corpus: Corpus) -> tuple[int, int, int]:
    """(latent channels, side of a square latent of size_px, text channels) of the cached data."""
    vae = corpus.vae
    return vae.config.latent_channels, config.size_px // vae.spatial_compression_ratio, corpus.texts.states.shape[1]


def validation_loss(predict, corpus: Corpus, config: Config, others: bool = False) -> float:
    """Mean flow loss on 64 fixed held-out samples at fixed times and noises, `encode_batch` at once. `predict(x_s, s, batch)` -> v.
    `others`: each with another picture's condition."""
    batch, draws = corpus.fixed(64), Draws(1234, 0)
    if others:
        batch = dataclasses.replace(batch, cond=batch.cond.roll(1, 0))
    z = draws.normal(*batch.x0.shape)
    s = torch.linspace(0.05, 1.0, len(z), device=z.device)
    parts = zip(batch.split(config.encode_batch), z.split(config.encode_batch), s.split(config.encode_batch))
    with torch.no_grad(), autocast(config):
        return float(torch.cat([flow_loss(predict(flow_path(b.x0, z, s), s, b), b.x0, z) for b, z, s in parts]).mean())


def train_flow(name: str, model: SanaTransformer2DModel, config: Config, out: Path, corpus: Corpus, held_out: Corpus,
               steps: int, batch_size: int, lr: float) -> SanaTransformer2DModel:
    """Flow matching of all weights of `model` as stage `name`; -> the averaged weights (`model` itself where `ema` is 0)."""
    shift = config.teacher_shift or resolution_shift(config.size_px)
    count = local_batch(batch_size, config)
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    ema = Ema(model, config.ema) if config.ema else None
    average = ema.module if ema else model
    shard_model(model, config)
    opt = make_optimizer(layer_groups(model, lr, config), config)
    if ema:
        shard_model(average, config)

    def loss_of(x0, z, s, text, mask, weight) -> torch.Tensor:
        with autocast(config):
            v = predict_flow(model, flow_path(x0, z, s), s, text, mask)
        return flow_loss(v, x0, z, weight).mean()

    loss_of = maybe_compile(config.compile_denoiser, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total = 0.0
        for part in draws.parts(config.micro_batches):
            batch = corpus.draw(count, part)
            z, s = part.normal(*batch.x0.shape), shifted_time(part.normal(count), shift)
            loss = loss_of(batch.x0, z, s, batch.text, batch.mask, batch.weight) / config.micro_batches
            loss.backward()
            total += float(loss.detach())
        numbers = apply_gradients(opt, step, steps, config.teacher_clip, config, total)
        if ema:
            ema.update(model, step)
        return {"loss": total, **numbers}

    def preview(step: int, folder: Path) -> dict[str, float]:
        batch = held_out.fixed(16)
        with autocast(config):
            latents = sample_teacher(TrigFlowTeacher(average), batch, Draws(7, 0).normal(*batch.x0.shape), 16, 3.0)
        contact_sheet(torch.cat([held_out.decode(latents), held_out.decode(batch.x0)]), folder / f"preview-{step:06d}.png", 16)
        predict = lambda x_s, s, b: predict_flow(average, x_s, s, b.text, b.mask)
        return {"val_loss": validation_loss(predict, held_out, config), **monitor.check(folder, held_out, latents, config.latent_band)}

    parts = {"model": model, **({"ema": ema} if ema else {}), "opt": opt}
    run(name, out, config, steps, parts, train_step, batch_size, preview, corpus.pixels.hash)
    return average


def train_teacher(config: Config, out: Path) -> None:
    """Trains, and writes OUT/teacher/transformer with the averaged weights; with a `base`, its other parts beside it."""
    config = with_base(config, out)
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    channels, sample_size, text_channels = latent_shape(config, corpus)
    torch.manual_seed(config.seed)
    if config.base:
        model, report = teacher_from_base(load_transformer(config.base))
        check_fits(model, channels, text_channels)
        report["config"] |= set_latent_size(model, sample_size, config.interpolation_scale)
        report_changes(report, config.base, out / "teacher", config.dry_run)
    else:
        model = build_teacher(config, channels, sample_size, text_channels)
        use_explicit_softmax(model)
    average = train_flow("teacher", model.to(device()), config, out, corpus, held_out, config.teacher_steps, config.teacher_batch, config.teacher_lr)
    # a ControlNet of the base is not the teacher's: it was trained on other features and on other times
    save_folder(out / "teacher", {"transformer": average}, config.base, drop=("controlnet",))
