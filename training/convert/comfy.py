"""LoRA files for ComfyUI: NVlabs' module names, q/k/v (k/v in the cross attention) fused into one pair, and back.

    python -m training.convert lora-to-comfy   IN(.safetensors, or the folder of diffusers or peft) OUT.safetensors
    python -m training.convert lora-from-comfy IN.safetensors OUT.safetensors

A pair adds delta = alpha/rank · up · down to its weight. Parts of rank r fuse to rank n·r: the downs stacked, the ups block-
diagonal, alpha · n, so that alpha/rank stays. A part without adapter has zero rows in the up and no column of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.checkpoint import write_atomic
from training.convert.keymap import diffusers_modules, native_name

PEFT_WEIGHTS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(r"(?!diffusion_model\.)(?:transformer\.|base_model\.model\.)?(.+?)\.(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
COMFY_KEY = re.compile(r"diffusion_model\.(.+?)\.(?:(lora_A|lora_down|lora_B|lora_up)\.weight|(alpha))")
PARTS_KEY = "sana_parts"           # in the header of an exported file: native module -> [[diffusers module, rank, alpha, dtype], …]
KEPT_SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64, torch.float64: torch.float64}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WIDER}


class Pair(NamedTuple):
    """delta = alpha/rank · up · down."""

    down: Tensor   # [rank, in], a convolution's [rank, in, kh, kw]
    up: Tensor     # [out, rank], a convolution's [out, rank, 1, 1]
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# ---- the maths -------------------------------------------------------------------------------------------------------


def fuse(parts: list[Pair | None]) -> Pair:
    """One pair for stacked weights of equal height; None = a part without adapter.

    Ups are scaled only where parts have different alpha/rank, and are then kept one precision wider, so that
    unfuse restores them to the bit.
    """
    present = [p for p in parts if p is not None]
    first = max(present, key=lambda p: abs(p.scale))
    height, rank = first.up.shape[0], sum(p.rank for p in present)
    alpha = first.alpha * rank / first.rank
    dtype = first.up.dtype if all(p.scale == first.scale for p in present) else WIDER[first.up.dtype]
    up = torch.zeros(height * len(parts), rank, dtype=dtype)
    column = 0
    for i, part in enumerate(parts):
        if part is not None:
            factor = 1.0 if part.scale == first.scale else part.scale / first.scale
            up[i * height : (i + 1) * height, column : column + part.rank] = part.up.to(dtype) * factor
            column += part.rank
    return Pair(torch.cat([p.down for p in present]), up, alpha)


def unfuse(pair: Pair, ranks: list[int | None], scales: list[float | None], dtypes: list[torch.dtype | None]) -> list[Pair | None]:
    """Undo fuse: ranks[i] = None where part i has no adapter; scales[i] = the alpha/rank it had, None = that of the pair."""
    height, column, parts = pair.up.shape[0] // len(ranks), 0, []
    for i, rank in enumerate(ranks):
        if rank is None:
            parts.append(None)
            continue
        columns = slice(column, column := column + rank)
        up = pair.up[i * height : (i + 1) * height, columns]
        scale = scales[i] or pair.scale
        if not math.isclose(scale, pair.scale, rel_tol=1e-6):
            up = up.to(WIDER[up.dtype]) * (pair.scale / scale)
        parts.append(Pair(pair.down[columns].clone(), up.to(dtypes[i] or pair.up.dtype).contiguous(), scale * rank))
    return parts


def split(pair: Pair, count: int) -> list[Pair | None]:
    """A fused pair of unknown origin in `count` parts of the same delta: each part keeps the columns that are not zero for it."""
    ups = pair.up.chunk(count)
    kept = [(up != 0).any(0) for up in ups]
    if not any(k.any() for k in kept):                      # untrained: B is zero
        kept = [torch.ones_like(k) for k in kept]
    return [Pair(pair.down[k], up[:, k].contiguous(), pair.alpha * int(k.sum()) / pair.rank) if k.any() else None
            for up, k in zip(ups, kept)]


# ---- files -----------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; ValueError names NaN and says what is wrong with the file."""
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"no LoRA at {file}: wanted a .safetensors file (pickled weights can run code and are not read)")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors, header = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): copy or save it again") from error
    broken = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    if broken:
        raise ValueError(f"{file} holds NaN or infinite values in {', '.join(broken)}")
    return tensors, header


def read_json_header(header: dict[str, str], key: str, file: Path) -> dict:
    try:
        content = json.loads(header.get(key) or "{}")
    except ValueError as error:
        raise ValueError(f"{file}: {key} in its header is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: {key} in its header holds a {type(content).__name__}, wanted an object")
    return content


def pairs_of(tensors: dict[str, Tensor], key: re.Pattern, file: Path) -> dict[str, dict[str, Tensor]]:
    """module -> {down, up[, alpha]}; ValueError names every key that is something else, and every pair that does not fit."""
    found, odd = {}, []
    for name, tensor in tensors.items():
        if match := key.fullmatch(name):
            role = "alpha" if match[3] else {"lora_A": "down", "lora_B": "up"}.get(match[2], match[2].removeprefix("lora_"))
            found.setdefault(match[1], {})[role] = tensor
        else:
            odd.append(name)
    if odd or not found:
        hint = " (a ComfyUI file: use lora-from-comfy)" if key is KEY and any(k.startswith("diffusion_model.") for k in odd) else ""
        raise ValueError(f"{file}: wanted LoRA pairs of SANA's transformer only, but it has {', '.join(odd) or 'no tensors'}{hint}")
    for module, pair in found.items():
        absent = {"down", "up"} - pair.keys()
        if absent:
            raise ValueError(f"{file}: {module} has no lora_{absent.pop()}: the pair is incomplete")
        if "alpha" in pair and pair["alpha"].numel() != 1:
            raise ValueError(f"{file}: alpha of {module} is {list(pair['alpha'].shape)}, wanted one number")
        if pair["down"].ndim < 2 or pair["up"].ndim < 2 or pair["down"].shape[0] != pair["up"].shape[1] or pair["up"].dtype not in WIDER:
            raise ValueError(f"{file}: {module}: down {list(pair['down'].shape)} and up {list(pair['up'].shape)} ({pair['up'].dtype}) are not a pair")
    return found


def part_scale(settings: dict, module: str, rank: int) -> float:
    """alpha/rank (alpha/√rank with rsLoRA) that peft's settings give a module; without settings 1, as in diffusers."""
    if not settings:
        return 1.0
    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module), settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def transformer_settings(header: dict[str, str], file: Path) -> dict:
    """peft's settings out of diffusers' header entry, without the prefix."""
    entries = read_json_header(header, LORA_ADAPTER_METADATA_KEY, file)
    return {k.removeprefix("transformer."): v for k, v in entries.items()}


def read_lora(source: Path) -> tuple[dict[str, Pair], dict[str, str]]:
    """diffusers module -> pair, and the header (peft's settings under diffusers' key) of a diffusers file or folder, or a peft folder."""
    file, settings = source, None
    if source.is_dir():
        names = [n for n in (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS) if (source / n).is_file()]
        if not names:
            raise ValueError(f"{source}: wanted {LORA_WEIGHT_NAME_SAFE} (diffusers) or {PEFT_WEIGHTS} (peft) in it")
        file = source / names[0]
        if names[0] == PEFT_WEIGHTS:
            if not (source / PEFT_SETTINGS).is_file():
                raise ValueError(f"{source} has no {PEFT_SETTINGS}: the rank's scale alpha is not known without it")
            settings = json.loads((source / PEFT_SETTINGS).read_text(encoding="utf-8"))
    tensors, header = read_tensors(file)
    if settings is not None:
        kept = {f"transformer.{k}": settings[k] for k in KEPT_SETTINGS if settings.get(k)}
        header = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(kept)}
    settings = settings or transformer_settings(header, file)
    if settings.get("use_dora"):
        raise ValueError(f"{file}: DoRA has a magnitude that ComfyUI's pairs cannot carry: train without use_dora")
    pairs = {}
    for module, pair in pairs_of(tensors, KEY, file).items():
        rank = pair["down"].shape[0]
        alpha = pair["alpha"].item() if "alpha" in pair else part_scale(settings, module, rank) * rank
        pairs[module] = Pair(pair["down"], pair["up"], alpha)
    return pairs, header


def lora_to_comfy(source: Path | str, out: Path | str) -> list[str]:
    """Writes the adapter in ComfyUI's names, fused; returns notes."""
    pairs, header = read_lora(Path(source))
    groups: dict[str, list] = {}
    for module in pairs:
        native, part, parts = native_name(module)
        groups.setdefault(native, [None] * parts)[part] = module
    tensors, layout, rescaled = {}, {}, []
    for native, modules in groups.items():
        parts = [None if m is None else pairs[m] for m in modules]
        pair = parts[0] if len(parts) == 1 else fuse(parts)
        if pair.up.dtype != next(p for p in parts if p).up.dtype:
            rescaled.append(native)
        name = f"diffusion_model.{native}"
        tensors |= {f"{name}.lora_down.weight": pair.down.contiguous(), f"{name}.lora_up.weight": pair.up.contiguous(), f"{name}.alpha": torch.tensor(pair.alpha)}
        layout[native] = [[m, pairs[m].rank, pairs[m].alpha, str(pairs[m].up.dtype).removeprefix("torch.")] for m in modules if m]
    save(tensors, header | {"format": "pt", PARTS_KEY: json.dumps(layout)}, out)
    notes = [f"{len(pairs)} pairs -> {len(groups)} for ComfyUI"]
    return notes + ([f"parts with different alpha/rank, kept one precision wider: {', '.join(rescaled)}"] if rescaled else [])


def read_layout(header: dict[str, str], file: Path) -> dict[str, dict[str, tuple]]:
    """native module -> {diffusers module: (rank, alpha, dtype)} as lora_to_comfy wrote it; {} for a foreign file."""
    try:
        return {native: {module: (int(rank), float(alpha), DTYPES[dtype]) for module, rank, alpha, dtype in rows}
                for native, rows in read_json_header(header, PARTS_KEY, file).items()}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: {PARTS_KEY} in its header is not as lora-to-comfy writes it ({error})") from error


def parts_of(native: str, fused: Pair, layout: dict[str, tuple], file: Path) -> dict[str, Pair]:
    """diffusers module -> its pair; `layout` as lora_to_comfy left it for this module, or empty."""
    modules = list(layout) if len(layout) == 1 and native_name(*layout).parts == 1 else diffusers_modules(native)
    if len(modules) > 1 and (fused.up.ndim != 2 or fused.up.shape[0] % len(modules)):
        raise ValueError(f"{file}: {native}: up {list(fused.up.shape)} does not divide into {len(modules)} parts")
    if not layout:
        parts = [fused] if len(modules) == 1 else split(fused, len(modules))
    elif not layout.keys() <= set(modules) or sum(rank for rank, _, _ in layout.values()) != fused.rank:
        raise ValueError(f"{file}: {native} has rank {fused.rank}, its header says {layout}: the file was changed; remove {PARTS_KEY} from its header")
    else:
        ranks, alphas, dtypes = zip(*(layout.get(m, (None, None, None)) for m in modules))
        parts = unfuse(fused, ranks, [alpha and alpha / rank for rank, alpha in zip(ranks, alphas)], dtypes)
    return {m: p for m, p in zip(modules, parts) if p is not None}


def lora_from_comfy(source: Path | str, out: Path | str) -> list[str]:
    """Writes a ComfyUI file of SANA as diffusers' (and the app's) LoRA file; returns notes."""
    source = Path(source)
    tensors, header = read_tensors(source)
    layout, settings = read_layout(header, source), transformer_settings(header, source)
    pairs: dict[str, Pair] = {}
    for native, pair in pairs_of(tensors, COMFY_KEY, source).items():
        alpha = pair["alpha"].item() if "alpha" in pair else float(pair["down"].shape[0])       # ComfyUI: no alpha = scale 1
        pairs |= parts_of(native, Pair(pair["down"], pair["up"], alpha), layout.get(native, {}), source)
    if settings and not all(math.isclose(part_scale(settings, m, p.rank), p.scale, rel_tol=1e-6) for m, p in pairs.items()):
        settings = {}                                                                           # another tool has changed the pairs
    header = {k: v for k, v in header.items() if k != PARTS_KEY} | {"format": "pt"}
    if not settings:
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps({f"transformer.{k}": v for k, v in make_settings(pairs).items()})
    written = {}
    for module, pair in pairs.items():
        written |= {f"transformer.{module}.lora_A.weight": pair.down.contiguous(), f"transformer.{module}.lora_B.weight": pair.up.contiguous()}
    save(written, header, out)
    return [f"{len(tensors)} tensors -> {len(pairs)} pairs for diffusers"]


def make_settings(pairs: dict[str, Pair]) -> dict:
    """peft's settings for these pairs: the most common rank and alpha, and by name where a module's are others."""
    rank = Counter(p.rank for p in pairs.values()).most_common(1)[0][0]
    alpha = Counter(p.alpha for p in pairs.values()).most_common(1)[0][0]
    return {"r": rank, "lora_alpha": alpha, "target_modules": sorted(pairs),
            "rank_pattern": {m: p.rank for m, p in pairs.items() if p.rank != rank},
            "alpha_pattern": {m: p.alpha for m, p in pairs.items() if p.alpha != alpha}}


def save(tensors: dict[str, Tensor], header: dict[str, str], out: Path | str) -> None:
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: wanted a file name that ends in .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors, header)
    write_atomic(out, lambda file: file.write(data))
