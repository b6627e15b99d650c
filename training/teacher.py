"""Stage 2: the flow-matching teacher, text to image, with qk-norm and a time embedding that sees [0, 1] (SANA-Sprint §3.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel

from sana_app.model.attention import use_explicit_softmax
from sana_app.model.network import TrigFlowTeacher, predict_flow
from training.batches import Corpus
from training.config import Config
from training.flow import flow_loss, flow_path, shifted_time
from training.loop import Draws, Ema, adamw, apply_gradients, autocast, device, maybe_compile, run
from training.sampling import sample_teacher
from training.sheets import contact_sheet


def build_teacher(config: Config, corpus: Corpus) -> SanaTransformer2DModel:
    """A stock SANA transformer with qk-norm and timestep_scale 0.001, shaped by the recipe and by the corpus' latents."""
    channels, sample_size = corpus.latents.images.shape[1], corpus.latents.images.shape[2]
    width = 32 * config.heads
    return SanaTransformer2DModel(
        in_channels=channels, out_channels=channels, sample_size=sample_size, patch_size=1,
        num_attention_heads=config.heads, attention_head_dim=32, num_layers=config.layers,
        num_cross_attention_heads=config.cross_heads, cross_attention_head_dim=width // config.cross_heads, cross_attention_dim=width,
        caption_channels=corpus.texts.states.shape[1], qk_norm="rms_norm_across_heads", timestep_scale=0.001, guidance_embeds=False,
        interpolation_scale=1.0)  # sine-cosine positions: with 64 tokens they are learnt sooner than through padding alone


def validation_loss(predict, corpus: Corpus, config: Config) -> float:
    """Mean flow loss on 64 fixed held-out samples at fixed times and noises. `predict(x_s, s, batch)` -> v."""
    batch, draws = corpus.fixed(64), Draws(1234, 0)
    z = draws.normal(*batch.x0.shape)
    s = torch.linspace(0.05, 1.0, len(z), device=z.device)
    with torch.no_grad(), autocast(config):
        return float(flow_loss(predict(flow_path(batch.x0, z, s), s, batch), batch.x0, z).mean())


def train_teacher(config: Config, out: Path) -> None:
    """Trains, and writes OUT/teacher/transformer with the averaged weights."""
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    torch.manual_seed(config.seed)
    model = build_teacher(config, corpus).to(device())
    use_explicit_softmax(model)
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    ema = Ema(model, config.ema)
    opt = adamw([(list(model.parameters()), config.teacher_lr)], config)

    def loss_of(x0: torch.Tensor, z: torch.Tensor, s: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with autocast(config):
            v = predict_flow(model, flow_path(x0, z, s), s, text, mask)
        return flow_loss(v, x0, z).mean()

    loss_of = maybe_compile(config.compile_denoiser, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total, count = 0.0, config.teacher_batch // config.micro_batches
        for _ in range(config.micro_batches):
            batch = corpus.draw(count, draws)
            z, s = draws.normal(*batch.x0.shape), shifted_time(draws.normal(count), config.teacher_shift)
            loss = loss_of(batch.x0, z, s, batch.text, batch.mask) / config.micro_batches
            loss.backward()
            total += float(loss.detach())
        numbers = apply_gradients(opt, step, config.teacher_steps, config.teacher_clip, config)
        ema.update(model, step)
        return {"loss": total, **numbers}

    def preview(step: int, folder: Path) -> dict[str, float]:
        batch = held_out.fixed(16)
        with autocast(config):
            latents = sample_teacher(TrigFlowTeacher(ema.module), batch, Draws(7, 0).normal(*batch.x0.shape), 16, 3.0)
        contact_sheet(torch.cat([held_out.decode(latents), held_out.decode(batch.x0)]), folder / f"preview-{step:06d}.png", 16)
        predict = lambda x_s, s, b: predict_flow(ema.module, x_s, s, b.text, b.mask)
        return {"val_loss": validation_loss(predict, held_out, config)}

    run("teacher", out, config, config.teacher_steps, {"model": model, "ema": ema, "opt": opt}, train_step, config.teacher_batch,
        preview, corpus.pixels.hash)
    ema.module.save_pretrained(out / "teacher" / "transformer")
