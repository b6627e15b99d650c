"""LoRA from a handful of pictures (DreamBooth, arXiv 2208.12242; LoRA, arXiv 2106.09685), with peft and this project's loop.

    python -m training lora --recipe emoji-lora --set data=my/pictures --set lora_prompt="a sks mug"     ->  runs/emoji-lora/lora

| base                              | loss                                                                              |
|-----------------------------------|-----------------------------------------------------------------------------------|
| base SANA or teacher              | flow matching                                                                     |
| Sprint, with `lora_teacher`       | sCM + LADD (student.py); the adapter sits on the student only                     |
| Sprint, alone                     | consistency training: sCM with the picture's own velocity in place of a teacher's |

Only q, k, v and out of self and cross attention can carry an adapter; the ControlNet and all else stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from sana_app.model import trigflow
from sana_app.model.adapter import ABOUT_KEY
from sana_app.model.attention import use_explicit_softmax
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.network import TrigFlowTeacher, predict_flow
from sana_app.model.text import SETTINGS_FILE, TextSettings
from training import monitor
from training.base import check_fits, frozen_dtype, load_part, load_transformer, with_base
from training.batches import Batch, Corpus, weights_hash
from training.checkpoint import write_atomic
from training.conditions import check_condition
from training.config import Config
from training.discriminator import Discriminator
from training.distributed import is_main, main_first, refuse_fsdp
from training.flow import flow_loss, flow_path, resolution_shift, shifted_time
from training.loop import Draws, autocast, code_version, device, local_batch, run
from training.optim import apply_gradients
from training.lora_pictures import captioned, draw_class
from training.lora_suggest import CLASS_PICTURES, settled
from training.losses import jvp_of_student, normalised_tangent, scm_loss, scm_tangent
from training.optim import make_optimizer
from training.sampling import sample_student, sample_teacher
from training.sheets import contact_sheet
from training.student import Distillation, Logvar
from training.teacher import latent_shape
from training.text import lazy_text_encoder

TARGETS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


# ---- the model beneath ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """Where the parts of the model beneath lie. `teacher`: folder with the flow teacher of a Sprint model, or None."""

    folder: Path
    teacher: Path | None
    config: Config  # with the folder's own autoencoder, text encoder and prompt length


def find_base(config: Config, out: Path) -> Base:
    """`config.base`, or what the stages before left in OUT: the student with its teacher, else the teacher."""
    if not config.base:
        for name in ("student", "controlnet", "teacher"):
            if (out / name / "transformer" / "config.json").is_file():
                return Base(out / name, out / "controlnet" if name == "student" else None, config)
        raise ValueError(f"no model to adapt: give its folder with --set base=FOLDER, or train one in {out} first")
    config, teacher = with_base(config, out), Path(config.lora_teacher) if config.lora_teacher else None
    if teacher is not None and not (teacher / "transformer" / "config.json").is_file():
        raise ValueError(f"lora_teacher={teacher}: wanted a folder with the flow teacher's transformer/ in it")
    folder = Path(config.base)
    if (folder / SETTINGS_FILE).is_file():
        config = replace(config, max_tokens=TextSettings.of_folder(folder).max_tokens)
    return Base(folder, teacher, config)


def load_network(folder: Path) -> TrigFlowTeacher:
    """The frozen transformer of a folder, and its ControlNet where it has one."""
    controlnet = load_part(folder / "controlnet", SanaSprintControlNetModel) if (folder / "controlnet").is_dir() else None
    network = TrigFlowTeacher(load_transformer(folder), controlnet).to(device()).requires_grad_(False).eval()
    use_explicit_softmax(network)
    return network


def add_adapter(transformer: SanaTransformer2DModel, config: Config) -> nn.ModuleDict:
    """Puts a fresh adapter (B = 0: nothing changes yet) on the frozen transformer; returns its layers, float32, by name."""
    unknown = [t for t in config.lora_targets if t not in TARGETS]
    if unknown or not config.lora_targets:
        raise ValueError(f"lora_targets={','.join(config.lora_targets)}: wanted some of {', '.join(TARGETS)}")
    transformer.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian",
                                       target_modules=[TARGETS[t] for t in config.lora_targets]))
    cast_training_params(transformer, torch.float32)
    layers = {name: module for name, module in transformer.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    return nn.ModuleDict({name.replace(".", "/"): nn.ModuleList([m.lora_A["default"], m.lora_B["default"]]) for name, m in layers.items()})


def save_adapter(folder: Path, transformer: SanaTransformer2DModel, about: dict) -> Path:
    """FOLDER/pytorch_lora_weights.safetensors as diffusers writes and reads it; rank and alpha go into its header with `about`."""
    peft_config = transformer.peft_config["default"]
    # of peft's settings only those that say something: older versions refuse names they do not know
    settings = {"r": peft_config.r, "lora_alpha": peft_config.lora_alpha, "target_modules": sorted(peft_config.target_modules)}
    header = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in settings.items()}, indent=2), ABOUT_KEY: json.dumps(about)}

    def write(tensors: dict, path: str) -> None:
        write_atomic(Path(path), lambda file: file.write(safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, header)))
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer), save_function=write)
    return folder / "pytorch_lora_weights.safetensors"


# ---- the losses -------------------------------------------------------------------------------------------------
# Each is backward(step, draws, corpus, weight) -> numbers: the gradients of one micro-batch.


def lines_scale(config: Config, draws: Draws, count: int) -> torch.Tensor:
    """1 for samples that train with their lines, 0 without: [B]."""
    return (draws.uniform(count) < config.lora_lines).float()


def flow_way(config: Config, net: TrigFlowTeacher) -> Callable:
    """Flow matching, as for the teacher."""
    shift = config.teacher_shift or resolution_shift(config.size_px)

    def backward(step: int, draws: Draws, corpus: Corpus, weight: float) -> dict[str, float]:
        count = local_batch(config.lora_batch, config)
        batch = corpus.draw(count, draws)
        z, s = draws.normal(*batch.x0.shape), shifted_time(draws.normal(count), shift)
        with autocast(config):
            v = predict_flow(net.transformer, flow_path(batch.x0, z, s), s, batch.text, batch.mask, None, net.controlnet, batch.cond,
                             lines_scale(config, draws, count))
        loss = flow_loss(v, batch.x0, z, batch.weight).mean()
        (weight / config.micro_batches * loss).backward()
        return {"flow": loss.item()}
    return backward


def consistency_way(config: Config, net: TrigFlowTeacher, logvar: Logvar) -> Callable:
    """sCM without a teacher: dx/dt of the sample's own path, whose mean over (x0, z) is the field of the pictures themselves
    (consistency training, arXiv 2410.11081, §3). It has no guidance and no adversarial term."""
    def backward(step: int, draws: Draws, corpus: Corpus, weight: float) -> dict[str, float]:
        count = local_batch(config.lora_batch, config)
        batch = corpus.draw(count, draws)
        x0, z = batch.x0 * trigflow.SIGMA_DATA, draws.normal(*batch.x0.shape) * trigflow.SIGMA_DATA
        t = trigflow.t_from_normal(draws.normal(count), config.scm_mean, config.scm_std)
        w = torch.tensor(config.guidance, device=x0.device)[(draws.uniform(count) * len(config.guidance)).long()]
        scale, x_t = lines_scale(config, draws, count), trigflow.interpolate(x0, z, t)
        function = lambda x, t: net(x, t, batch.text, batch.mask, batch.cond, scale, w)
        with autocast(config):
            dxdt = trigflow.velocity(x0, z, t)
            F_minus, dF = jvp_of_student(function, x_t / trigflow.SIGMA_DATA, t, dxdt)
            g = normalised_tangent(scm_tangent(F_minus, dF, x_t, dxdt, t, min(1.0, step / max(1, config.scm_warmup))))
            F = function(x_t / trigflow.SIGMA_DATA, t)
        loss = scm_loss(F, F_minus, g, t, logvar(net.transformer, t, w)).mean()
        (weight / config.micro_batches * loss).backward()
        return {"scm": loss.item()}
    return backward


def distillation_way(config: Config, teacher: TrigFlowTeacher, net: TrigFlowTeacher, disc: Discriminator, logvar: Logvar) -> Callable:
    """The student's own losses: the teacher's field, and pictures that the discriminator cannot tell from the given ones."""
    as_student = replace(config, student_batch=config.lora_batch, student_base=True, controlnet_no_lines=1 - config.lora_lines)

    def backward(step: int, draws: Draws, corpus: Corpus, weight: float) -> dict[str, float]:
        weighted = replace(as_student, scm_weight=weight * config.scm_weight, ladd_weight=weight * config.ladd_weight)
        return Distillation(weighted, teacher, net, disc, logvar).backward(step, draws, corpus)
    return backward


# ---- the stage --------------------------------------------------------------------------------------------------


def load_teacher_for(net: TrigFlowTeacher, folder: Path | None, config: Config) -> TrigFlowTeacher | None:
    """The flow teacher beside a Sprint base, or None, saying what that means."""
    if not net.transformer.config.guidance_embeds:
        return None
    if folder is None:
        print("lora: the base is a one-step (Sprint) model and lora_teacher is not set: training without a teacher (consistency training). Colours and "
              "shapes are learnt, fine texture less. For the full distillation loss: --set lora_teacher=FOLDER with the flow teacher's transformer/")
        return None
    teacher = load_network(folder)
    for key in ("in_channels", "caption_channels"):
        if teacher.transformer.config[key] != net.transformer.config[key]:
            raise ValueError(f"lora_teacher={folder} has {key}={teacher.transformer.config[key]}, the base {net.transformer.config[key]}: not its teacher")
    if teacher.transformer.config.guidance_embeds:
        raise ValueError(f"lora_teacher={folder} is itself a one-step model: wanted the flow teacher it was distilled from")
    if max(config.disc_blocks) >= teacher.transformer.config.num_layers:
        raise ValueError(f"disc_blocks={config.disc_blocks}: the teacher has blocks 0 to {teacher.transformer.config.num_layers - 1}")
    return teacher


def class_corpus(config: Config, out: Path, net: TrigFlowTeacher, corpus: Corpus) -> Corpus | None:
    """Pictures of the class for prior preservation: given, or drawn by the model itself; None where none are wanted."""
    if not (config.lora_prior_data or config.lora_prior_prompt):
        return None
    if config.lora_prior_data:
        with main_first():
            data = captioned(config.lora_prior_data, config.lora_prior_prompt, out / "cache", "lora_prior_prompt")
    else:
        channels, side, _ = latent_shape(config, corpus)
        encode = lazy_text_encoder(config.text_encoder, config.max_tokens)
        with main_first():
            data = draw_class(net, config.lora_prior_prompt, config.lora_prior_images or CLASS_PICTURES, encode, (channels, side, side),
                              corpus.decode, config, weights_hash(net.transformer), out / "cache")
    return Corpus(replace(config, data=data, toned_weight=1.0), out, "train")


def train_lora(config: Config, out: Path) -> None:
    """Trains, and writes OUT/lora/pytorch_lora_weights.safetensors."""
    refuse_fsdp(config, "an adapter is small, and the frozen model beneath can be held in bf16: frozen_bf16=true")
    if not config.data:
        raise ValueError("no pictures given: --set data=FOLDER with a handful of them, and NAME.txt beside each or lora_prompt=\"a photo of sks dog\"")
    base = find_base(config, out)
    for folder in (base.folder, base.teacher) if config.lora_lines else ():
        if folder is not None:
            check_condition(folder / "controlnet", config.condition)
    with main_first():
        config = replace(base.config, data=captioned(config.data, config.lora_prompt, out / "cache", "lora_prompt"))
    corpus = Corpus(config, out, "train")
    net = load_network(base.folder)
    channels, side, text_channels = latent_shape(config, corpus)
    check_fits(net.transformer, channels, text_channels)
    teacher = load_teacher_for(net, base.teacher, config)
    sprint = net.transformer.config.guidance_embeds
    config = settled(config, corpus.count, alternating=teacher is not None)
    if config.lora_lines and (net.controlnet is None or teacher is not None and teacher.controlnet is None):
        raise ValueError(f"lora_lines={config.lora_lines:g} wants a ControlNet in the base (and in the teacher): set lora_lines=0")
    prior = class_corpus(config, out, net, corpus)
    if not sprint:
        net.to(frozen_dtype(config))  # as in diffusers' script; the adapter itself stays float32

    torch.manual_seed(config.seed)
    adapter = add_adapter(net.transformer, config)
    if config.checkpointing and not sprint:  # not under a JVP
        net.transformer.enable_gradient_checkpointing()
    parts: dict = {"adapter": adapter}
    if sprint:
        width = net.transformer.config.num_attention_heads * net.transformer.config.attention_head_dim
        parts["logvar"] = logvar = Logvar(width, channels * side * side).to(device())
    groups = [([p for part in parts.values() for p in part.parameters()], config.lora_lr)]
    parts["opt"] = opt = make_optimizer(groups, config)
    disc_opt = None
    if teacher is not None:
        parts["disc"] = disc = Discriminator(teacher, config.disc_blocks).to(device())
        parts["disc_opt"] = disc_opt = make_optimizer([(list(disc.parameters()), config.student_disc_lr)], config)
        backward = distillation_way(config, teacher, net, disc, logvar)
    else:
        backward = consistency_way(config, net, logvar) if sprint else flow_way(config, net)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for part in draws.parts(config.micro_batches):
            found = backward(step, part, corpus, 1.0)
            if prior is not None:
                found |= {f"prior_{k}": v for k, v in backward(step, part, prior, config.lora_prior_weight).items()}
            for key, value in found.items():
                numbers[key] = numbers.get(key, 0.0) + value / config.micro_batches
        on_disc = disc_opt is not None and step % 2 == 1
        total = sum(numbers.values())  # finite if all are
        numbers |= apply_gradients(disc_opt if on_disc else opt, step, config.lora_steps, config.lora_clip, config, total)
        if disc_opt is not None and not on_disc:
            disc_opt.zero_grad(set_to_none=True)  # the adversarial pass went through the heads
        return numbers

    run("lora", out, config, config.lora_steps, parts, train_step, config.lora_batch, lambda step, folder: preview(step, folder, config, net, corpus), corpus.pixels.hash,
        turns=2 if disc_opt else 1)
    captions = list(dict.fromkeys(c for shelf in corpus.shelves for cs in shelf.pixels.captions for c in cs))
    about = {"name": out.name, "base": base.folder.name, "prompt": config.lora_prompt, "captions": captions[:20], "pictures": corpus.count,
             "steps": config.lora_steps, "loss": "distillation" if teacher else "consistency" if sprint else "flow", "code": code_version()}
    if not is_main():
        return
    file = save_adapter(out / "lora", net.transformer, about)
    print(f"wrote {file}: rank {config.lora_rank}, {sum(p.numel() for p in adapter.parameters()):,} weights, {file.stat().st_size / 2**20:.2f} MB")


@torch.no_grad()
def preview(step: int, folder: Path, config: Config, net: TrigFlowTeacher, corpus: Corpus) -> dict[str, float]:
    """A sheet: the model's own pictures of the captions, the same with the adapter, and the given pictures. `change`: mean
    difference of the first two; `distance`, `distance_before`: of each to the given ones (unit-variance latents)."""
    batch: Batch = corpus.fixed(8)
    noise, w = Draws(7, 0).normal(*batch.x0.shape), config.guidance[len(config.guidance) // 2]
    found = []
    for switch in (net.transformer.disable_adapters, net.transformer.enable_adapters):
        switch()
        with autocast(config):
            found.append(sample_student(net, batch, [noise], w, config.lora_lines and 1.0) if net.transformer.config.guidance_embeds
                         else sample_teacher(net, batch, noise, 16, w, config.lora_lines and 1.0))
    before, after = found
    contact_sheet(torch.cat([corpus.decode(x).cpu() for x in (before, after, batch.x0)]), folder / f"preview-{step:06d}.png", len(batch.x0))
    distance = lambda a, b: float((a - b).abs().mean())
    watched = monitor.check(folder, corpus, after, config.latent_band) if config.keep_pixels else {}  # it encodes the pictures anew
    return {"change": distance(after, before), "distance": distance(after, batch.x0), "distance_before": distance(before, batch.x0), **watched}
