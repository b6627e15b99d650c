"""Start from a published checkpoint: load it strictly, make a base SANA the teacher for Sprint, write whole model folders.

A base is a folder in the diffusers layout (SanaPipeline or SanaSprintPipeline) or an NVlabs `.pth`, which holds the transformer
only. Nothing is loaded with gaps in silence: every weight that is added is printed and listed in the run folder's base.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.modeling_utils import ModelMixin

from sana_app.model.folder import CONFIG_FILES, check_weights, move_into_place, read_json
from training.config import Config
from training.distributed import barrier, is_main, save_model

# what a teacher for Sprint has and base SANA has not (SANA-Sprint, arXiv 2503.09641, §3.1)
TEACHER = dict(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
QK_NORM = re.compile(r"transformer_blocks\.\d+\.attn[12]\.norm_[qk]\.weight")
SMALL_FILE_BYTES = 2 ** 20


# ---- where things are ------------------------------------------------------------------------------------------------


def with_base(config: Config, out: Path, previous: str = "") -> Config:
    """`config` with `base` (else the folder that stage `previous` left in OUT, if it is a whole model) and, where they are not
    set, `vae` and `text_encoder` taken from that folder. A run with neither base nor such a folder stays as it is."""
    base = config.base
    if not base and previous and (out / previous / "model_index.json").exists():
        base = str(out / previous)
    if not base:
        return config
    path = Path(base)
    if path.suffix == ".pth":
        if not path.is_file():
            raise ValueError(f"base={base}: no such file")
        if not config.vae or config.text_encoder == "minilm":
            raise ValueError(f"base={base} holds the transformer only: set vae to an AutoencoderDC folder, and text_encoder to a folder "
                             "with text_encoder/ and tokenizer/ in it")
        return dataclasses.replace(config, base=base)
    if not (path / "transformer" / "config.json").is_file():
        raise ValueError(f"base={base}: wanted a model folder with transformer/ in it (diffusers layout), or an NVlabs .pth file")
    vae, text_encoder = config.vae, config.text_encoder
    if not vae and (path / "vae" / "config.json").is_file():
        vae = str(path / "vae")
    if text_encoder == "minilm" and (path / "text_encoder").is_dir():
        text_encoder = str(path)
    return dataclasses.replace(config, base=base, vae=vae, text_encoder=text_encoder)


def weight_variant(folder: Path) -> str | None:
    """None where the folder has plain weights, else the first of bf16 and fp16 that it has."""
    names = [p.name for p in folder.glob("diffusion_pytorch_model*")]
    if any(re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors", name) for name in names):
        return None
    return next((v for v in ("bf16", "fp16") if any(f".{v}" in name for name in names)), None)


def load_part(folder: Path, model_class: type[ModelMixin], dtype: torch.dtype = torch.float32) -> ModelMixin:
    """One network of a model folder, in `dtype`. ValueError names every tensor that is missing, too many or of another shape."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"no {folder.name} at {folder.parent}: run the stage before, or set base to a model folder that has one")
    variant = weight_variant(folder)
    check_weights(folder, model_class, variant)
    return model_class.from_pretrained(folder, variant=variant, torch_dtype=dtype, local_files_only=True)


def load_transformer(base: str | Path, dtype: torch.dtype = torch.float32) -> SanaTransformer2DModel:
    """The transformer of a model folder, or of an NVlabs .pth, in `dtype`."""
    if Path(base).suffix == ".pth":
        from training.convert.pth import transformer_from_pth
        return transformer_from_pth(base).to(dtype)
    return load_part(Path(base) / "transformer", SanaTransformer2DModel, dtype)


def frozen_dtype(config: Config) -> torch.dtype:
    """Frozen networks need no fp32 master weights: under bf16 autocast they can be held in bf16, at half the memory."""
    return torch.bfloat16 if config.frozen_bf16 and config.precision == "bf16" else torch.float32


def refuse_sprint(model: ModelMixin, stage: str) -> None:
    if model.config.guidance_embeds:
        raise ValueError(f"the {stage} stage trains with the flow loss, but the base embeds the guidance scale: it is a finished Sprint "
                         "model; start from base SANA or from a teacher, or distil with the student stage")


# ---- base -> teacher -------------------------------------------------------------------------------------------------


def teacher_from_base(base: SanaTransformer2DModel) -> tuple[SanaTransformer2DModel, dict]:
    """(teacher, report): `base` with q/k norms (new ones at 1) and a time embedding fed with [0, 1]; its tensors are taken
    over, not copied: do not use `base` afterwards.

    With norms at 1, q and k still get normalised: a teacher is not its base before it has been trained. The weights of the time
    embedder see s where they saw 1000·s. Train everything from the first step: the time embedder alone first ends in a loss
    spike when the rest joins (maths.md §3).
    """
    refuse_sprint(base, "teacher")
    config = {k: v for k, v in base.config.items() if not k.startswith("_")}
    if config["qk_norm"] not in (None, TEACHER["qk_norm"]):
        raise ValueError(f"the base has qk_norm={config['qk_norm']!r}, wanted none or {TEACHER['qk_norm']!r}: its norms would mean another thing")
    with torch.device("meta"):
        teacher = SanaTransformer2DModel.from_config(config | TEACHER)
    weights = base.state_dict()
    added = {name: torch.ones(tensor.shape, dtype=base.dtype, device=base.device) for name, tensor in teacher.state_dict().items()
             if name not in weights and QK_NORM.fullmatch(name)}
    teacher.load_state_dict(weights | added, assign=True)  # strict: nothing else may be missing or too many
    teacher.patch_embed.pos_embed = base.patch_embed.pos_embed  # not part of the state
    changed = {key: [config[key], value] for key, value in TEACHER.items() if config[key] != value}
    refed = [n for n in weights if ".timestep_embedder." in n] if "timestep_scale" in changed else []
    return teacher.train(base.training).requires_grad_(True), {"added": sorted(added), "config": changed, "other_inputs": refed}


def set_latent_size(model: SanaTransformer2DModel, sample_size: int, interpolation_scale: float = 0.0) -> dict:
    """Makes `model` one for latents of `sample_size` per side; -> what changed in its config, {key: [old, new]}.

    Published SANA up to 1024 px has no positional embedding (interpolation_scale None): it runs at any size, and sample_size (16, 32,
    64, 128) only tells the stock SanaPipeline which table of aspect ratios to round to. With positions, the stock PatchEmbed stretches
    those of sample_size over any other grid; the scale is multiplied by new/old, so that pictures of the new size see exactly those.
    interpolation_scale > 0 asks for sine-cosine positions of that scale instead: NVlabs turns them on at 2048 px (1) and 4096 px (2).
    """
    old_size, old_scale = model.config.sample_size, model.config.interpolation_scale
    scale = interpolation_scale or (None if old_scale is None else old_scale * sample_size / old_size)
    changed = {key: [old, new] for key, old, new in (("sample_size", old_size, sample_size), ("interpolation_scale", old_scale, scale)) if old != new}
    if changed:
        old, width = model.patch_embed, model.config.num_attention_heads * model.config.attention_head_dim
        model.register_to_config(sample_size=sample_size, interpolation_scale=scale)
        model.patch_embed = PatchEmbed(sample_size, sample_size, model.config.patch_size, model.config.in_channels, width,
                                       interpolation_scale=scale, pos_embed_type=None if scale is None else "sincos").to(old.proj.weight.device)
        model.patch_embed.proj = old.proj
    return changed


def check_fits(model: ModelMixin, channels: int, text_channels: int) -> None:
    """Refuses a base whose latents or text states are not those of the cached data."""
    for key, came, part in (("in_channels", channels, "autoencoder's latents"), ("caption_channels", text_channels, "text encoder's states")):
        if model.config[key] != came:
            raise ValueError(f"the base has {key} {model.config[key]}, but the {part} have {came} channels: set vae and text_encoder to the "
                             "base's own, or swap them with the swap stage first")


def report_changes(report: dict, base: str, folder: Path, dry_run: bool = False) -> None:
    """Prints what was added to or changed in the base, every weight by name, and, but for a dry run, stores it as FOLDER/base.json."""
    if not is_main():
        return
    if not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "base.json").write_text(json.dumps({"base": base, **report}, indent=1))
    added = report.get("added", [])
    print(f"base {base}: {len(added)} new weights{': ' + ', '.join(added) if added else ''}")
    for key, (old, new) in report.get("config", {}).items():
        print(f"  {key}: {old} -> {new}")
    if report.get("other_inputs"):
        print(f"  these see s in [0, 1] where they saw 1000·s: {', '.join(report['other_inputs'])}")


# ---- whole model folders ---------------------------------------------------------------------------------------------


def link_or_copy(source: Path, target: Path) -> None:
    """A file or folder at a new place: weights as hard links where the file system can (no space, and saving anew never writes
    into them), small files as copies."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            link_or_copy(entry, target / entry.name)
        return
    source = source.resolve()  # the hub's cache is made of symbolic links
    if source.suffix == ".safetensors" and source.stat().st_size > SMALL_FILE_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(source, target)


def components(folder: Path) -> list[str]:
    """Names of the parts of a model folder; of a stage's folder without model_index.json, its transformer and ControlNet."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    names = [k for k, v in index.items() if isinstance(v, list) and v[1] is not None]
    names += [n for n in ("transformer", "controlnet") if n not in names]
    return [n for n in names if any((folder / n / file).is_file() for file in CONFIG_FILES)]


def save_folder(folder: Path, networks: dict, rest: str | Path = "", drop: tuple[str, ...] = (), index: dict | None = None) -> None:
    """Writes the trained `networks` (component name -> module, or scheduler) into FOLDER, beside the other components of model folder
    `rest` (not those in `drop`), with its model_index.json, changed by `index`: stock diffusers loads FOLDER if it loads `rest`.
    Every process must call it.

    All is written beside and then moved into place: an interrupted save leaves no folder that looks whole.
    """
    new = folder / "model.incomplete"
    if is_main():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    barrier()
    for name, network in networks.items():
        save_model(network, new / name)
    if is_main():
        rest = Path(rest) if rest else None
        if rest is not None and rest.is_dir():
            for name in components(rest):
                if name not in networks and name not in drop:
                    link_or_copy(rest / name, new / name)
            for name in ("prompt.json", "sampling.json"):
                if (rest / name).exists():
                    shutil.copy2(rest / name, new)
            if (rest / "model_index.json").exists():
                kept = {k: v for k, v in read_json(rest / "model_index.json").items() if k not in drop}
                (new / "model_index.json").write_text(json.dumps(kept | (index or {}), indent=2) + "\n")
        move_into_place(new, folder)
    barrier()


def tile(vae: AutoencoderDC, side_px: int) -> None:
    """Lets `vae` encode and decode pictures larger than `side_px` in tiles of that side, an eighth of it overlapping and blended: the
    memory of one tile, and nearly, not exactly, the numbers of the whole picture."""
    factor = vae.spatial_compression_ratio
    if side_px % factor or side_px < 2 * factor:
        raise ValueError(f"vae_tiling={side_px}: wanted a multiple of {factor} px, at least {2 * factor} (512 is a good one for 1024 px and more)")
    stride = max(factor, side_px * 7 // 8 // factor * factor)
    vae.enable_tiling(side_px, side_px, stride, stride)
