"""Another autoencoder or text encoder under a finished teacher, in three stages.

    python -m training swap --recipe NAME --out DIR --set base=FOLDER --set vae=FOLDER [--set text_encoder=FOLDER] [--set text_encoder_lr=1e-6]

(a) the new part alone against the old (swap_plan.py): what does not fit is found here, and a part that cannot work stops here;
(b) a short run of everything, with the loss before and after and a sheet of samples: OUT/swap-short;
(c) with swap_full=true, the full run, from the same start: OUT/swap is then a model folder in the diffusers layout.
The flow loss trains it, so the base is base SANA or a teacher; a ControlNet in the folder learns along.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer

from sana_app.model.folder import read_json, write_json
from sana_app.model.network import TrigFlowTeacher, predict_flow
from sana_app.model.text import encode_text, token_states
from training import monitor
from training.base import components, link_or_copy, save_folder
from training.batches import Batch, Corpus
from training.config import Config
from training.data.cache import pixel_cache
from training.distributed import barrier, is_main, main_first, shard_model
from training.flow import flow_loss, flow_path, resolution_shift, shifted_time
from training.loop import Draws, autocast, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients
from training.optim import make_optimizer
from training.sampling import sample_teacher
from training.sheets import contact_sheet
from training.swap_networks import learning_groups, load_networks, start_networks
from training.swap_plan import Plan, examine_autoencoder, examine_text_encoder, vae_folder, write_vae
from training.teacher import validation_loss
from training.text import encoder_folders, load_text_encoder, prompt_encoder, settings_of

# ---- (a) -------------------------------------------------------------------------------------------------------------


def make_plan(config: Config, out: Path) -> Plan:
    """Measures the new parts against the base's own. ValueError where there is nothing to swap."""
    base = Path(config.base)
    missing = [n for n in ("transformer", "vae", "text_encoder", "tokenizer") if not config.base or n not in components(base)]
    if missing:
        raise ValueError(f"base={config.base!r}: wanted a whole model folder in the diffusers layout; it lacks {', '.join(missing)}")
    new_text = config.text_encoder not in ("minilm", config.base)
    if not (config.vae or new_text or config.text_encoder_lr):
        raise ValueError("nothing to swap: set vae to an autoencoder's folder, text_encoder to a folder with text_encoder/ and tokenizer/, "
                         "or text_encoder_lr to tune the base's own text encoder")
    plan = Plan(joint=config.text_encoder_lr > 0)
    with main_first():
        pixels = pixel_cache(config.data, "val", config.size_px, out / "cache")
    if config.vae:
        examine_autoencoder(plan, base / "vae", vae_folder(config.vae), pixels, config)
    if new_text:
        captions = sorted({c for cs in pixels.captions for c in cs})
        examine_text_encoder(plan, config.base, config.text_encoder, captions[::max(1, len(captions) // 256)], config)
    return plan


def write_parts(plan: Plan, config: Config, folder: Path) -> None:
    """FOLDER: the parts of the swapped model that are not trained, with its model_index.json and prompt.json; all parts where
    nothing has to be trained."""
    base, text = Path(config.base), Path(config.text_encoder if plan.text else config.base)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left_out = ["vae"] * bool(plan.vae) + ["text_encoder", "tokenizer"] * plan.text + ["transformer", "controlnet"] * plan.trains
    for name in set(components(base)) - set(left_out):
        link_or_copy(base / name, folder / name)
    if plan.vae:
        write_vae(plan, base / "vae", vae_folder(config.vae), folder / "vae")
    index = read_json(base / "model_index.json")
    if plan.text or plan.joint:
        tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer", local_files_only=True)
        text_config = AutoConfig.from_pretrained(text / "text_encoder", local_files_only=True)
        index |= {"text_encoder": ["transformers", MODEL_MAPPING[type(text_config)].__name__], "tokenizer": ["transformers", type(tokenizer).__name__]}
    if plan.text:
        link_or_copy(text / "text_encoder", folder / "text_encoder")
        link_or_copy(text / "tokenizer", folder / "tokenizer")
        settings_of(str(text), load_text_encoder(str(text), config.max_tokens)[1], config.max_tokens).save(folder)
    elif (base / "prompt.json").exists():
        shutil.copy2(base / "prompt.json", folder)
    write_json(folder / "model_index.json", index)


# ---- (b) and (c) -----------------------------------------------------------------------------------------------------


def live_text(batch: Batch, encode: Callable | None) -> Batch:
    """The batch with text states computed now, the empty prompt's too; the cached ones where `encode` is None."""
    if encode is None:
        return batch
    count = len(batch.captions)
    text, mask = encode([*batch.captions, *[""] * count])  # together, so that both have one length
    return dataclasses.replace(batch, text=text[:count].float(), mask=mask[:count], null_text=text[count:].float(), null_mask=mask[count:])


def judge(networks: nn.ModuleDict, encode: Callable | None, held_out: Corpus, config: Config) -> tuple[dict[str, float], torch.Tensor]:
    """(validation numbers, latents of the 16 fixed samples)."""
    transformer, controlnet = networks["transformer"], networks["controlnet"] if "controlnet" in networks else None

    def predict(x_s: torch.Tensor, s: torch.Tensor, b: Batch) -> torch.Tensor:
        b = live_text(b, encode)
        return predict_flow(transformer, x_s, s, b.text, b.mask, None, controlnet, b.cond)

    with torch.no_grad(), autocast(config):
        batch = live_text(held_out.fixed(16), encode)
        latents = sample_teacher(TrigFlowTeacher(transformer, controlnet), batch, Draws(7, 0).normal(*batch.x0.shape), 16, 3.0)
        found = {"val_loss": validation_loss(predict, held_out, config)}
        if encode is not None:
            cached = held_out.fixed(16)
            then, now = cached.text[cached.mask > 0], batch.text[batch.mask > 0]
            found["text_drift"] = float((now - then).norm() / then.norm())
    return found, latents


def tune(name: str, steps: int, networks: nn.ModuleDict, new_layers: list[str], corpus: Corpus, held_out: Corpus, out: Path) -> tuple[nn.ModuleDict, Callable | None]:
    """Flow matching of the swapped model as run OUT/NAME; -> (averaged networks, their live text encoding or None)."""
    config = corpus.config
    transformer, controlnet = networks["transformer"], networks["controlnet"] if "controlnet" in networks else None
    shift, count = config.teacher_shift or resolution_shift(config.size_px), local_batch(config.swap_batch, config)
    for network in (transformer, controlnet) if config.checkpointing else ():
        if network is not None:
            network.enable_gradient_checkpointing()
    ema = Ema(networks, config.ema) if config.ema else None
    average = ema.module if ema else networks
    shard_model(networks, config)
    opt = make_optimizer(learning_groups(networks, new_layers, config), config)
    if ema:
        shard_model(average, config)
    encode = encode_average = None
    if "text_encoder" in networks:
        tokenizer = AutoTokenizer.from_pretrained(encoder_folders(config.text_encoder)[0], local_files_only=True)
        settings = settings_of(config.text_encoder, networks["text_encoder"], config.max_tokens)
        encode = prompt_encoder(tokenizer, networks["text_encoder"], settings, token_states)
        encode_average = prompt_encoder(tokenizer, average["text_encoder"], settings, encode_text)

    def loss_of(x0, z, s, text, mask, cond, scale, weight) -> torch.Tensor:
        with autocast(config):
            v = predict_flow(transformer, flow_path(x0, z, s), s, text, mask, None, controlnet, cond, scale)
        return flow_loss(v, x0, z, weight).mean()

    loss_of = maybe_compile(config.compile_denoiser, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total = 0.0
        for part in draws.parts(config.micro_batches):
            batch = corpus.draw(count, part)
            z, s = part.normal(*batch.x0.shape), shifted_time(part.normal(count), shift)
            scale = (part.uniform(count) >= config.controlnet_no_lines).float()
            with autocast(config):
                text, mask = encode(batch.captions) if encode else (batch.text, batch.mask)
            loss = loss_of(batch.x0, z, s, text, mask, batch.cond, scale, batch.weight) / config.micro_batches
            loss.backward()
            total += float(loss.detach())
        numbers = apply_gradients(opt, step, steps, config.teacher_clip, config, total)
        if ema:
            ema.update(networks, step)
        return {"loss": total, **numbers}

    def preview(step: int, folder: Path) -> dict[str, float]:
        found, latents = judge(average, encode_average, held_out, config)
        contact_sheet(torch.cat([held_out.decode(latents), held_out.decode(held_out.fixed(16).x0)]), folder / f"preview-{step:06d}.png", 16)
        return found | monitor.check(folder, held_out, latents, config.latent_band)

    if not config.dry_run:
        monitor.reference(out / name, held_out.latents.images)
    run(name, out, config, steps, {"networks": networks, **({"ema": ema} if ema else {}), "opt": opt}, train_step, config.swap_batch, preview, corpus.pixels.hash)
    return average, encode_average


def next_command() -> str:
    typed = sys.argv[1:]
    return f"python -m training {shlex.join(typed)} --set swap_full=true" if "swap" in typed else "the same with swap_full=true"


def short_run(plan: Plan, config: Config, old_config: Config, corpus: Corpus, held_out: Corpus, out: Path) -> dict:
    """Stage (b): base, swapped and shortly trained model side by side; -> the report."""
    with main_first():
        old_held_out = Corpus(old_config, out, "val")
    base, base_latents = judge(load_networks(Path(config.base)), None, old_held_out, old_config)
    networks, new_layers = start_networks(plan, config, held_out)
    if is_main():
        print(f"start anew: {', '.join(new_layers) or 'no layer'}; everything else keeps its bits")
    before, before_latents = judge(networks, None, held_out, config)
    average, encode = tune("swap-short", config.swap_short_steps, networks, new_layers, corpus, held_out, out)
    after, after_latents = judge(average, encode, held_out, config)
    if is_main():
        rows = [held_out.decode(held_out.fixed(16).x0), old_held_out.decode(base_latents), held_out.decode(before_latents), held_out.decode(after_latents)]
        contact_sheet(torch.cat([row.cpu() for row in rows]), out / "swap-short" / "report.png", len(rows[0]))
        print(f"(b) validation loss: base on its own parts {base['val_loss']:.4f}, swapped {before['val_loss']:.4f}, after "
              f"{config.swap_short_steps} steps {after['val_loss']:.4f}; samples, from the top real, base, swapped, after: {out / 'swap-short' / 'report.png'}")
        if not after["val_loss"] < before["val_loss"]:
            print("    the loss did not fall: lower swap_new_lr and swap_lr, or run more swap_short_steps, before the full run")
    return {"new_layers": new_layers, "val_loss_base": base["val_loss"], "val_loss_swapped": before["val_loss"], "steps": config.swap_short_steps,
            "val_loss_after": after["val_loss"]}


def train_swap(config: Config, out: Path) -> None:
    """Runs stage (a), (b) and, with swap_full, (c); writes OUT/swap-plan/report.json and at the end the model folder OUT/swap."""
    plan, folder = make_plan(config, out), out / "swap-plan"
    report = {"findings": plan.findings, "unfit": plan.unfit, **plan.numbers}

    def store() -> None:
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "report.json", report)

    if plan.trains and read_json(Path(config.base) / "transformer" / "config.json").get("guidance_embeds"):
        plan.unfit.append("the base is a finished Sprint model, which the flow loss would spoil: swap under its teacher, then distil again")
    store()
    if is_main():
        print("\n".join(["(a) the new part alone", *(f"    {line}" for line in plan.findings)]))
    if plan.unfit:
        raise ValueError(f"the swap stops at stage (a): {'; '.join(plan.unfit)}. Nothing was trained; the numbers are in {folder / 'report.json'}")
    if is_main():
        write_parts(plan, config, folder / "parts")
    barrier()
    if not plan.trains:
        if not config.dry_run:
            save_folder(out / "swap", {}, folder / "parts")
        if is_main():
            print("no training needed" if config.dry_run else f"wrote {out / 'swap'}, no training needed")
        return
    text = config.text_encoder if plan.text else config.base
    new_config = dataclasses.replace(config, vae=str(folder / "parts" / "vae"), text_encoder=text)
    old_config = dataclasses.replace(config, vae=str(Path(config.base) / "vae"), text_encoder=config.base)
    with main_first():
        held_out, corpus = Corpus(new_config, out, "val"), Corpus(new_config, out, "train")
    if config.dry_run:
        networks, new_layers = start_networks(plan, new_config, held_out)
        print(f"start anew: {', '.join(new_layers) or 'no layer'}")
        tune("swap-short", config.swap_short_steps, networks, new_layers, corpus, held_out, out)  # looks at the first batch and leaves
    report["short"] = short_run(plan, new_config, old_config, corpus, held_out, out)
    store()
    if not config.swap_full:
        if is_main():
            print(f"(c) not run. When report and samples look right: {next_command()}")
        return
    networks, new_layers = start_networks(plan, new_config, held_out)
    average, encode = tune("swap", config.swap_steps, networks, new_layers, corpus, held_out, out)
    report["full"] = {"steps": config.swap_steps, **judge(average, encode, held_out, new_config)[0]}
    store()
    save_folder(out / "swap", dict(average.items()), folder / "parts")
    condition = Path(config.base) / "controlnet" / "condition.json"
    if is_main():
        if condition.exists():
            shutil.copy2(condition, out / "swap" / "controlnet")
        print(f"(c) validation loss {report['full']['val_loss']:.4f} (base on its own parts {report['short']['val_loss_base']:.4f}); wrote {out / 'swap'}")
