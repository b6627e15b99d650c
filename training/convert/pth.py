"""NVlabs' .pth files from and to diffusers folders: the transformer (base, teacher, Sprint) and the ControlNet.

    python -m training.convert to-diffusers IN.pth OUT_FOLDER [--kind auto|base|teacher|sprint|controlnet]
    python -m training.convert to-pth FOLDER OUT.pth

What has no place in diffusers lies beside the weights in native_side.safetensors, and goes back from there: a round
trip restores every tensor of the file bit for bit. Traps: a .pth can hold code, so it is read with weights_only=True
and never otherwise; NVlabs' ControlNet does not compute what diffusers' does (see CONTROLNET_NOTE).
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.folder import WEIGHTS, read_json, weight_shapes, write_json
from training.checkpoint import write_atomic
from training.convert.describe import describe
from training.convert.keymap import from_native, to_native

SIDE_FILE = "native_side.safetensors"
CONTROLNETS = ("SanaControlNetModel", "SanaSprintControlNetModel")
# tensors of the native model that diffusers' has no place for; in a ControlNet's file the whole base model may lie as well
SIDE = r"y_embedder\.y_embedding|pos_embed|logvar_linear\.(weight|bias)"
SIDE_OF_CONTROLNET = SIDE + r"|blocks\.\d+\..+|final_layer\..+"
SIDE_OF_TRANSFORMER = SIDE + r"|controlnet\.\d+\..+"
CONTROLNET_NOTE = (
    "NVlabs' code adds residual i after base block i - 1 and feeds the copied blocks the output of base block 0; diffusers adds it after "
    "base block i and feeds them the patch embedding. The weights are NVlabs', unchanged, but they do not give NVlabs' pictures in diffusers "
    "(nor diffusers' in NVlabs' code): fine-tune after converting"
)


class Loaded(NamedTuple):
    """A .pth in diffusers' terms. The tensors are views of the file, mapped into memory."""

    kind: str                    # base, teacher, sprint or controlnet
    config: dict                 # config.json, with _class_name
    state: dict[str, Tensor]     # diffusers names
    side: dict[str, Tensor]      # native names: what has no place in diffusers
    wrapper: str                 # key of the weights in the file: state_dict, state_dict_ema, or "" for the bare dict
    notes: list[str]             # for a person: what was found, assumed and left out


def read_pth(path: Path | str, ema: bool = False) -> tuple[dict[str, Tensor], str, list[str]]:
    """Tensors of a .pth (mapped, not copied), the key they were under, and notes. ValueError says what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: wanted a .pth checkpoint")
    with open(path, "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch the file itself (git lfs pull)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a cut or foreign file raises about anything; nothing of it has been run
        text = str(error)
        if match := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(
                f"{path} is refused: beside tensors it holds Python objects ({match[1]}), which can run code when they are read; none was. "
                "If you made the file yourself, save it again as torch.save({'state_dict': model.state_dict()}, FILE)"
            ) from None
        # torch's own text advises to read the file unsafely: do not pass that on
        reason = type(error).__name__ if "weights_only" in text or not text.strip() else text.strip().splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read as a .pth: it is cut short, damaged or something else ({reason}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a dict of tensors or {{'state_dict': …}}")
    wrapper, notes = "", []
    if not any(isinstance(v, Tensor) for v in content.values()):
        found = [k for k in ("state_dict", "state_dict_ema") if isinstance(content.get(k), dict) and content[k]]
        wanted = ["state_dict_ema"] if ema else found
        if not found or wanted[0] not in found:
            raise ValueError(f"{path} has no {'state_dict_ema' if ema else 'state_dict'}: its keys are {', '.join(map(str, content))}")
        wrapper = wanted[0]
        left = [str(k) for k in content if k != wrapper]
        notes += [f"taken: {wrapper}; not converted: {', '.join(left)}"] if left else []
        content = content[wrapper]
    elif ema:
        raise ValueError(f"{path} is a bare dict of tensors: it has no state_dict_ema")
    odd = [str(k) for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor) or v.layout != torch.strided or v.is_quantized]
    if odd:
        raise ValueError(f"{path}: wanted names and dense tensors only, but these are something else: {', '.join(odd)}")
    size = path.stat().st_size
    swollen = [k for k, v in content.items() if v.numel() * v.element_size() > size]
    if swollen:
        raise ValueError(f"{path}: larger than the whole file: {', '.join(swollen)}; the file is damaged")
    return content, wrapper, notes


def empty_model(config: dict) -> torch.nn.Module:
    """The model of a config on the meta device: names and shapes only. A stock ControlNet's config lacks three keys of ours."""
    if config.get("_class_name") == "SanaControlNetModel":
        config = dict(guidance_embeds=False, qk_norm=None, timestep_scale=1.0) | config
    with torch.device("meta"):
        return model_class(config).from_config({k: v for k, v in config.items() if k != "_class_name"})


def model_class(config: dict) -> type:
    name = config.get("_class_name")
    if name != "SanaTransformer2DModel" and name not in CONTROLNETS:
        raise ValueError(f"the config is of {name}, wanted SanaTransformer2DModel, {' or '.join(CONTROLNETS)}")
    return SanaSprintControlNetModel if name in CONTROLNETS else SanaTransformer2DModel


def differences(found: dict[str, tuple], wanted: dict[str, tuple]) -> list[str]:
    """Every missing, unexpected and wrongly shaped weight, named."""
    lines = [f"{k} {list(wanted[k])} is missing" for k in wanted if k not in found]
    lines += [f"{k} {list(found[k])} has no place in this model" for k in found if k not in wanted]
    return lines + [f"{k} is {list(found[k])}, wanted {list(wanted[k])}" for k in wanted if k in found and found[k] != wanted[k]]


def convert(native: dict[str, Tensor], source: str = "the checkpoint", **given) -> tuple[str, dict, dict, dict, list[str]]:
    """kind, config, diffusers state (views), side tensors, notes; `given` as for describe(). Works on the meta device."""
    try:
        kind, config, notes = describe(native, **given)
    except ValueError as error:
        raise ValueError(f"{source}: {error} (options of python -m training.convert to-diffusers)") from error
    controlnet = kind == "controlnet"
    state = empty_model(config).state_dict()
    wanted = {k: tuple(v.shape) for k, v in to_native(state, controlnet).items()}
    side_names = SIDE_OF_CONTROLNET if controlnet else SIDE_OF_TRANSFORMER
    side = {k: v for k, v in native.items() if k not in wanted and re.fullmatch(side_names, k)}
    problems = differences({k: tuple(v.shape) for k, v in native.items() if k not in side}, wanted)
    if problems:
        raise ValueError(f"{source} is not a complete {kind} model ({notes[0]}):\n  " + "\n  ".join(problems))
    broken = [k for k in wanted if not native[k].is_meta and not torch.isfinite(native[k]).all()]
    if broken:
        raise ValueError(f"{source} holds NaN or infinite values in {', '.join(broken)}: the training run or the file is broken")
    if controlnet:
        notes.append(CONTROLNET_NOTE)
    bulk = [k for k in side if not re.fullmatch(SIDE, k)]
    if side:
        names = [k for k in side if k not in bulk] + ([f"{len(bulk)} weights of the {'base model' if controlnet else 'ControlNet'}"] if bulk else [])
        notes.append(f"without a place in diffusers, kept in {SIDE_FILE}: {', '.join(names)}")
    return kind, config, from_native(native, list(state), controlnet), side, notes


def load_pth(path: Path | str, ema: bool = False, **given) -> Loaded:
    """Reads and checks a .pth; `given` as for describe(): kind, cross_heads, head_dim, image_px, interpolation, timestep_scale."""
    native, wrapper, notes = read_pth(path, ema)
    kind, config, state, side, more = convert(native, str(path), **given)
    return Loaded(kind, config, state, side, wrapper, more + notes)


def build_model(loaded: Loaded) -> torch.nn.Module:
    """A real model with the weights copied in, in the file's dtype; SanaTransformer2DModel or SanaSprintControlNetModel."""
    config = {k: v for k, v in loaded.config.items() if k != "_class_name"}
    model, dtype = model_class(loaded.config).from_config(config), next(iter(loaded.state.values())).dtype
    model = model if model.dtype == dtype else model.to(dtype)
    model.load_state_dict(loaded.state, strict=True)
    return model


def transformer_from_pth(path: Path | str, **given) -> SanaTransformer2DModel:
    """The transformer of a .pth, ready to train; prints what was found and assumed."""
    loaded = load_pth(path, **given)
    if loaded.kind == "controlnet":
        raise ValueError(f"{path} is a ControlNet, wanted a transformer (its base model, if it is in the file: kind base)")
    print(*loaded.notes, sep="\n")
    return build_model(loaded)


def to_diffusers(path: Path | str, folder: Path | str, shard_size: str = "5GB", **given) -> Loaded:
    """Writes the folder that from_pretrained loads. One shard at a time is in memory beside the mapped file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    loaded = load_pth(path, **given)
    new = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(new, ignore_errors=True)
    model = empty_model(loaded.config)
    model.load_state_dict(loaded.state, strict=True, assign=True)
    model.save_pretrained(new, max_shard_size=shard_size)
    write_json(new / "config.json", read_json(new / "config.json") | {"_class_name": loaded.config["_class_name"]})
    metadata = {"format": "pt", "wrapper": loaded.wrapper, "kind": loaded.kind}
    metadata |= {"note": CONTROLNET_NOTE} if loaded.kind == "controlnet" else {}
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in loaded.side.items()}, new / SIDE_FILE, metadata=metadata)
    if folder.exists():
        folder.rmdir()
    os.replace(new, folder)
    return loaded


def read_folder(folder: Path, config: dict) -> dict[str, Tensor]:
    """The weights of a component folder, checked by name and shape against its config; ValueError names every difference."""
    wanted = {k: tuple(v.shape) for k, v in empty_model(config).state_dict().items()}
    problems = differences(weight_shapes(folder, None), wanted)
    if problems:
        raise ValueError(f"{folder}: weights and config.json do not belong together:\n  " + "\n  ".join(problems))
    state = {}
    for file in sorted(p for p in folder.glob("*.safetensors") if re.fullmatch(WEIGHTS % "", p.name)):
        with safe_open(file, framework="pt") as tensors:
            state |= {k: tensors.get_tensor(k) for k in tensors.keys()}
    return {k: state[k] for k in wanted}


def read_side(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as tensors:
        return {k: tensors.get_tensor(k) for k in tensors.keys()}, tensors.metadata() or {}


def to_pth(folder: Path | str, out: Path | str, side: Path | str | None = None) -> list[str]:
    """Writes FOLDER (a transformer or ControlNet in diffusers layout) as NVlabs' .pth; returns notes.

    side: the side file, or the folder it lies in, when it is not FOLDER's own (after a fine-tuning of the converted weights).
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "config.json").is_file():
        inner = [p.parent.name for p in folder.glob("*/config.json") if p.parent.name in ("transformer", "controlnet")]
        raise ValueError(f"{folder} has no config.json: wanted a component's folder" + (f", for example {folder / inner[0]}" if inner else ""))
    config = read_json(folder / "config.json")
    controlnet = config.get("_class_name") in CONTROLNETS
    native = to_native(read_folder(folder, config), controlnet)
    side = Path(side) if side else folder
    side = side / SIDE_FILE if side.is_dir() else side
    notes, wrapper = [CONTROLNET_NOTE] if controlnet else [], "state_dict"
    if side.is_file():
        tensors, metadata = read_side(side)
        twice = [k for k in tensors if k in native]
        if twice:
            raise ValueError(f"{side} belongs to another model: it and {folder} both have {', '.join(twice)}")
        native, wrapper = native | tensors, metadata.get("wrapper", wrapper)
    elif side != folder / SIDE_FILE:
        raise ValueError(f"{side} is missing: wanted the {SIDE_FILE} that to-diffusers wrote")
    else:
        notes.append(f"{folder} has no {SIDE_FILE}: written without y_embedder.y_embedding (NVlabs' empty prompt) and pos_embed")
    # torch.save writes the whole storage behind a view: give every weight a storage of its own
    native = {k: v if v.untyped_storage().nbytes() == v.numel() * v.element_size() else v.clone() for k, v in native.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda file: torch.save({wrapper: native} if wrapper else native, file))
    return notes
