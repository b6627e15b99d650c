"""Stage 3: a ControlNet on the flow teacher (flow-matching loss with lines; maths: residual i enters after base block i).

With `controlnet_base_lr` 0 the teacher stays frozen, as published. A small model trained from scratch learns much sooner
when the teacher goes on learning beneath its ControlNet; a share of samples without lines keeps its text-to-image alive.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel

from sana_app.model.attention import use_explicit_softmax
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.network import TrigFlowTeacher, predict_flow
from training.batches import Corpus
from training.config import Config
from training.flow import flow_loss, flow_path, shifted_time
from training.loop import Draws, Ema, adamw, apply_gradients, autocast, device, maybe_compile, run
from training.sampling import sample_teacher
from training.sheets import contact_sheet
from training.teacher import validation_loss


def train_controlnet(config: Config, out: Path) -> None:
    """Trains, and writes OUT/controlnet/{transformer,controlnet} with the averaged weights."""
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    base = SanaTransformer2DModel.from_pretrained(out / "teacher" / "transformer").to(device())
    torch.manual_seed(config.seed)
    pair = TrigFlowTeacher(base, SanaSprintControlNetModel.from_transformer(base, config.controlnet_layers))
    use_explicit_softmax(pair)
    if config.checkpointing:
        base.enable_gradient_checkpointing()
        pair.controlnet.enable_gradient_checkpointing()
    joint = config.controlnet_base_lr > 0
    base.requires_grad_(joint)
    ema = Ema(pair, config.ema)
    groups = [(list(pair.controlnet.parameters()), config.controlnet_lr)]
    opt = adamw(groups + ([(list(base.parameters()), config.controlnet_base_lr)] if joint else []), config)

    def loss_of(x0, z, s, text, mask, cond, scale) -> torch.Tensor:
        with autocast(config):
            v = predict_flow(base, flow_path(x0, z, s), s, text, mask, None, pair.controlnet, cond, scale)
        return flow_loss(v, x0, z).mean()

    loss_of = maybe_compile(config.compile_denoiser, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total, count = 0.0, config.controlnet_batch // config.micro_batches
        for _ in range(config.micro_batches):
            batch = corpus.draw(count, draws)
            z, s = draws.normal(*batch.x0.shape), shifted_time(draws.normal(count), config.teacher_shift)
            scale = (draws.uniform(count) >= (config.controlnet_no_lines if joint else 0.0)).float()
            loss = loss_of(batch.x0, z, s, batch.text, batch.mask, batch.cond, scale) / config.micro_batches
            loss.backward()
            total += float(loss.detach())
        numbers = apply_gradients(opt, step, config.controlnet_steps, config.teacher_clip, config)
        ema.update(pair, step)
        return {"loss": total, **numbers}

    def preview(step: int, folder: Path) -> dict[str, float]:
        batch = held_out.fixed(16)
        with autocast(config):
            latents = sample_teacher(ema.module, batch, Draws(7, 0).normal(*batch.x0.shape), 16, 3.0)
        rows = [held_out.drawings(batch), held_out.decode(latents).cpu(), held_out.decode(batch.x0).cpu()]
        contact_sheet(torch.cat(rows), folder / f"preview-{step:06d}.png", 16)
        average = ema.module
        predict = lambda x_s, s, b: predict_flow(average.transformer, x_s, s, b.text, b.mask, None, average.controlnet, b.cond)
        without = lambda x_s, s, b: predict_flow(average.transformer, x_s, s, b.text, b.mask)
        return {"val_loss": validation_loss(predict, held_out, config), "val_loss_off": validation_loss(without, held_out, config)}

    run("controlnet", out, config, config.controlnet_steps, {"pair": pair, "ema": ema, "opt": opt}, train_step, config.controlnet_batch,
        preview, corpus.pixels.hash)
    ema.module.transformer.save_pretrained(out / "controlnet" / "transformer")
    ema.module.controlnet.save_pretrained(out / "controlnet" / "controlnet")
