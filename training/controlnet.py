"""Stage 3: a ControlNet on base SANA or on the flow teacher (flow-matching loss with a condition; maths: residual i enters after base block i).

With `controlnet_base_lr` 0 the teacher stays frozen, as published. A small model trained from scratch learns much sooner
when the teacher goes on learning beneath its ControlNet; a share of samples without lines keeps its text-to-image alive.
What it follows is `condition` (conditions.py). For a one-step ControlNet later, train it on the teacher, not on base SANA: a Sprint
model's times are the teacher's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sana_app.model.attention import use_explicit_softmax
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.network import TrigFlowTeacher, predict_flow
from training import monitor
from training.base import check_fits, frozen_dtype, load_transformer, refuse_sprint, save_folder, with_base
from training.batches import Corpus
from training.conditions import write_condition
from training.config import Config
from training.distributed import is_main, shard_model
from training.flow import flow_loss, flow_path, resolution_shift, shifted_time
from training.loop import Draws, autocast, device, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients
from training.optim import layer_groups, make_optimizer
from training.sampling import sample_teacher
from training.sheets import contact_sheet
from training.teacher import latent_shape, validation_loss


def build_pair(config: Config, source: str | Path) -> TrigFlowTeacher:
    """The transformer of model folder `source` and a ControlNet copied from its first blocks, which changes nothing yet.

    A frozen transformer may be held in bf16; the ControlNet's weights are float32, copied from the unrounded ones.
    """
    joint = config.controlnet_base_lr > 0
    base = load_transformer(source)
    refuse_sprint(base, "controlnet")
    if 1000 * base.config.timestep_scale != 1 and is_main():
        print(f"the base at {source} is base SANA, whose times are 0..1000: its ControlNet serves base SANA. One that shall become one-step later "
              "is trained on a teacher (times 0..1: the teacher stage makes one)")
    torch.manual_seed(config.seed)
    controlnet = SanaSprintControlNetModel.from_transformer(base, config.controlnet_layers)
    dtype = torch.float32 if joint else frozen_dtype(config)
    return TrigFlowTeacher((base if base.dtype == dtype else base.to(dtype)).requires_grad_(joint), controlnet)


def train_controlnet(config: Config, out: Path) -> None:
    """Trains, and writes OUT/controlnet/{transformer,controlnet} with the averaged weights, beside the base's other parts.

    A frozen transformer is not in the checkpoints; at the end it is linked or copied from where it came.
    """
    config = with_base(config, out, "teacher")
    source = config.base or out / "teacher"
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    pair = build_pair(config, source).to(device())
    base, controlnet = pair.transformer, pair.controlnet
    channels, _, text_channels = latent_shape(config, corpus)
    check_fits(base, channels, text_channels)
    if not config.base:
        use_explicit_softmax(pair)
    if config.checkpointing:
        base.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    joint = config.controlnet_base_lr > 0
    trained = pair if joint else controlnet
    shift, count = config.teacher_shift or resolution_shift(config.size_px), local_batch(config.controlnet_batch, config)
    ema = Ema(trained, config.ema) if config.ema else None
    averaged = ema.module if ema else trained
    average = averaged if joint else TrigFlowTeacher(base, averaged)
    shard_model(pair, config)
    groups = layer_groups(controlnet, config.controlnet_lr, config) + (layer_groups(base, config.controlnet_base_lr, config) if joint else [])
    opt = make_optimizer(groups, config)
    if ema:
        shard_model(averaged, config)

    weak_step = round(config.controlnet_weak_share * config.controlnet_steps)

    def loss_of(x0, z, s, text, mask, cond, scale, weight) -> torch.Tensor:
        with autocast(config):
            v = predict_flow(base, flow_path(x0, z, s), s, text, mask, None, controlnet, cond, scale)
        return flow_loss(v, x0, z, weight).mean()

    loss_of = maybe_compile(config.compile_denoiser, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total = 0.0
        for part in draws.parts(config.micro_batches):
            batch = corpus.draw(count, part)
            z, s = part.normal(*batch.x0.shape), shifted_time(part.normal(count), shift)
            scale = (part.uniform(count) >= (config.controlnet_no_lines if joint else 0.0)).float()
            loss = loss_of(batch.x0, z, s, batch.text, batch.mask, batch.cond, scale, batch.weight) / config.micro_batches
            loss.backward()
            total += float(loss.detach())
        numbers = apply_gradients(opt, step, config.controlnet_steps, config.teacher_clip, config, total)
        if ema:
            ema.update(trained, step)
        if step + 1 == weak_step and not config.dry_run:
            save_folder(out / "controlnet" / "weak", {"controlnet": average.controlnet} | ({"transformer": average.transformer} if joint else {}))
        return {"loss": total, **numbers}

    def preview(step: int, folder: Path) -> dict[str, float]:
        batch = held_out.fixed(16)
        with autocast(config):
            latents = sample_teacher(average, batch, Draws(7, 0).normal(*batch.x0.shape), 16, 3.0)
        rows = [held_out.drawings(batch), held_out.decode(latents).cpu(), held_out.decode(batch.x0).cpu()]
        contact_sheet(torch.cat(rows), folder / f"preview-{step:06d}.png", 16)
        predict = lambda x_s, s, b: predict_flow(average.transformer, x_s, s, b.text, b.mask, None, average.controlnet, b.cond)
        without = lambda x_s, s, b: predict_flow(average.transformer, x_s, s, b.text, b.mask)
        return {"val_loss": validation_loss(predict, held_out, config), "val_loss_off": validation_loss(without, held_out, config),
                "val_loss_other": validation_loss(predict, held_out, config, others=True), **monitor.check(folder, held_out, latents, config.latent_band)}

    parts = {"pair" if joint else "controlnet": trained, **({"ema": ema} if ema else {}), "opt": opt}
    run("controlnet", out, config, config.controlnet_steps, parts, train_step, config.controlnet_batch, preview, corpus.pixels.hash)
    networks = {"transformer": average.transformer, "controlnet": average.controlnet} if joint else {"controlnet": average.controlnet}
    if not joint and config.base.endswith(".pth"):
        networks["transformer"] = base
    save_folder(out / "controlnet", networks, source)
    write_condition(out / "controlnet" / "controlnet", config.condition)
