"""LoRA adapters: refuse by name what is damaged or does not fit, load it, and say what it is.

The file is diffusers' own: safetensors with `transformer.NAME.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], and
W' = W + scale·(alpha/r)·B·A. Its header holds peft's settings (rank, alpha) under "lora_adapter_metadata", and, in files
written by this project, what the adapter was trained on under "about".
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open

ABOUT_KEY = "about"
ADAPTER = "sketch"  # what the loaded adapter is called inside the pipeline
NAME = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")
NAME_CHARS = 40


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: `label` is what the page shows, `captions` what it was trained on (empty for foreign files)."""

    file: Path
    label: str
    scale: float
    captions: tuple[str, ...] = field(default=())


def parse_adapter(text: str) -> tuple[Path, float]:
    """`PATH[:SCALE]` -> (path, scale), scale 1 where none is given. A path may have colons of its own."""
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        scale = float(tail)
    except ValueError:
        return Path(text).expanduser(), 1.0
    if not math.isfinite(scale):
        raise ValueError(f"adapter {text!r}: a number is wanted as the scale, for example {path}:0.8, got {tail}")
    return Path(path).expanduser(), scale


def adapter_file(path: Path) -> Path:
    """The safetensors file that `path` means: itself, or, for a folder, the standard name or the only one in it."""
    if path.is_dir():
        if (path / LORA_WEIGHT_NAME_SAFE).is_file():
            return path / LORA_WEIGHT_NAME_SAFE
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:5]) or "no .safetensors file"
            raise ValueError(f"adapter folder {path}: {LORA_WEIGHT_NAME_SAFE} is wanted, found {names}; name the file itself")
        return found[0]
    if not path.is_file():
        raise ValueError(f"no adapter at {path}: wanted a .safetensors file, or a folder with {LORA_WEIGHT_NAME_SAFE} in it")
    if path.suffix != ".safetensors":
        raise ValueError(f"adapter {path}: only .safetensors files are loaded (pickled weights can run code)")
    return path


def read_adapter(file: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """(tensors, peft's settings, about) of a file; the two dicts are empty where the header has none."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter {file} is damaged or cut short ({error}): copy or save it again") from error
    found = []
    for key in (LORA_ADAPTER_METADATA_KEY, ABOUT_KEY):
        try:
            found.append(json.loads(header.get(key, "{}")))
        except ValueError as error:
            raise ValueError(f"adapter {file}: {key!r} in its header is not readable JSON ({error})") from error
        if not isinstance(found[-1], dict):
            raise ValueError(f"adapter {file}: {key!r} in its header holds a {type(found[-1]).__name__}, wanted an object")
    return tensors, *found


def misfits(tensors: dict[str, torch.Tensor], transformer: SanaTransformer2DModel) -> list[str]:
    """Everything that keeps these tensors from being an adapter of this transformer, in words; [] if nothing does."""
    modules, pairs, problems = dict(transformer.named_modules()), {}, []
    for key, tensor in tensors.items():
        if match := NAME.fullmatch(key):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        else:
            problems.append(f"{key} is not named like an adapter's weight, transformer.….lora_A.weight or lora_B.weight")
        if not torch.isfinite(tensor.float()).all():
            problems.append(f"{key} holds NaN or infinite values")
    for name, pair in pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.ndim < 2:
            problems.append(f"the model has no layer {name}")
        elif len(pair) < 2:
            problems.append(f"{name} has no lora_{'B' if 'A' in pair else 'A'}")
        else:
            rank, shapes = pair["A"].shape[0], (tuple(pair["A"].shape), tuple(pair["B"].shape))
            wanted = (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))
            if shapes != wanted:
                problems.append(f"{name}: lora_A and lora_B are {shapes[0]} and {shapes[1]}, wanted {wanted[0]} and {wanted[1]}")
    return problems if tensors else ["it holds no tensors"]


def load_adapter(pipe, path: Path, scale: float = 1.0) -> Adapter:
    """Put the adapter on the pipeline's transformer (pipe.unload_lora_weights() takes it off again, to the last bit).

    ValueError names what is missing, damaged or does not fit; the pipeline is then as it was.
    """
    if getattr(pipe.transformer, "peft_config", None):
        raise ValueError("an adapter is loaded already: unload it first")
    file = adapter_file(path).resolve()
    tensors, settings, about = read_adapter(file)
    if problems := misfits(tensors, pipe.transformer):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        hint = "; it has ComfyUI's or NVlabs' names: convert it to diffusers' first" if any("lora_up" in k or k.startswith(("diffusion_model.", "lora_unet_")) for k in tensors) else ""
        made_for = f" (it was trained on {clean(about['base'])})" if about.get("base") else ""
        raise ValueError(f"adapter {file} does not fit this model{made_for}: {'; '.join(problems[:3])}{more}{hint}")
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER, use_safetensors=True, local_files_only=True)
        pipe.set_adapters([ADAPTER], [scale])
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        if hasattr(pipe.transformer, "peft_config"):
            pipe.unload_lora_weights()
        raise ValueError(f"adapter {file}: the settings in its header do not fit its weights ({str(error)[:300]})") from error
    for name, parameter in pipe.transformer.named_parameters():
        if ".lora_" in name:  # in the model's own precision: no cast at every call
            parameter.data = parameter.data.to(pipe.transformer.dtype)
    name = clean(about.get("name")) or (file.parent.name if file.name == LORA_WEIGHT_NAME_SAFE else file.stem)[:NAME_CHARS]
    captions = about.get("captions") if isinstance(about.get("captions"), list) else []
    return Adapter(file, name if scale == 1 else f"{name} × {scale:g}", scale, tuple(filter(None, map(clean, captions))))


def clean(text: object) -> str:
    """One short printable line of a text that came with somebody's file; "" for anything else."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:NAME_CHARS * 5] if isinstance(text, str) else ""
