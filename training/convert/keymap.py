"""The names of SANA's weights in diffusers and in NVlabs' code (ComfyUI uses NVlabs'), in one table.

Only one direction is written down, diffusers -> native: each diffusers weight is a whole native one, or one of the 2 or
3 equal row blocks of a fused one (q, k, v of the self attention; k, v of the cross attention). The way back asks for
every diffusers name in turn, so that nothing can be forgotten in one direction only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

# outside the blocks: diffusers module -> native module
MODULES = {
    "patch_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",   # base SANA and teachers
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",       # Sprint
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "scale_shift_table": "final_layer.scale_shift_table",              # a parameter of its own, without .weight
    "proj_out": "final_layer.linear",
    "input_block": "controlnet.0.before_proj",
}  # fmt: skip
# inside transformer_blocks.N: diffusers module -> (native module, part, number of parts)
BLOCK = {
    "scale_shift_table": ("scale_shift_table", 0, 1),
    "attn1.to_q": ("attn.qkv", 0, 3),
    "attn1.to_k": ("attn.qkv", 1, 3),
    "attn1.to_v": ("attn.qkv", 2, 3),
    "attn1.to_out.0": ("attn.proj", 0, 1),
    "attn1.norm_q": ("attn.q_norm", 0, 1),
    "attn1.norm_k": ("attn.k_norm", 0, 1),
    "attn2.to_q": ("cross_attn.q_linear", 0, 1),
    "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": ("cross_attn.kv_linear", 1, 2),
    "attn2.to_out.0": ("cross_attn.proj", 0, 1),
    "attn2.norm_q": ("cross_attn.q_norm", 0, 1),
    "attn2.norm_k": ("cross_attn.k_norm", 0, 1),
    "ff.conv_inverted": ("mlp.inverted_conv.conv", 0, 1),
    "ff.conv_depth": ("mlp.depth_conv.conv", 0, 1),
    "ff.conv_point": ("mlp.point_conv.conv", 0, 1),
}


class Native(NamedTuple):
    """Where a diffusers weight lies: rows part/parts .. (part+1)/parts of the native one."""

    name: str
    part: int
    parts: int


def native_name(name: str, controlnet: bool = False) -> Native:
    """Place of a diffusers weight ("….to_k.weight") or module ("….to_k"); ValueError if NVlabs' code has none."""
    module, leaf = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name).groups(default="")
    if match := re.fullmatch(r"controlnet_blocks\.(\d+)", module):
        return Native(f"controlnet.{match[1]}.after_proj{leaf}", 0, 1)
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        if match[2] in BLOCK:
            native, part, parts = BLOCK[match[2]]
            block = f"controlnet.{match[1]}.copied_block" if controlnet else f"blocks.{match[1]}"
            return Native(f"{block}.{native}{leaf}", part, parts)
    elif module in MODULES:
        return Native(MODULES[module] + leaf, 0, 1)
    raise ValueError(f"{name} has no counterpart in NVlabs' code: wanted a weight of SanaTransformer2DModel or its ControlNet")


def diffusers_modules(native: str) -> list[str]:
    """The modules that a native one holds, in the order of its rows ("….attn.qkv" -> to_q, to_k, to_v); ValueError if unknown."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", native):
        found = [f"transformer_blocks.{match[1]}.{module}" for module, row in BLOCK.items() if row[0] == match[2]]
    else:
        found = [module for module, name in MODULES.items() if name == native]
        if len(found) > 1:
            raise ValueError(f"{native} is {' or '.join(found)}, and nothing in the file says which")
    if not found:
        raise ValueError(f"{native} is not a module of SANA's transformer in NVlabs' names")
    return found


def to_native(state: dict[str, Tensor], controlnet: bool = False) -> dict[str, Tensor]:
    """State dict in native names, q/k/v fused; only the fused tensors are new memory. Also on the meta device."""
    parts: dict[str, list] = {}
    for name, tensor in state.items():
        native, part, count = native_name(name, controlnet)
        parts.setdefault(native, [None] * count)[part] = tensor
    incomplete = [name for name, tensors in parts.items() if any(t is None for t in tensors)]
    if incomplete:
        raise ValueError(f"only a part of q, k, v is there for {', '.join(incomplete)}: the weights are incomplete")
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def from_native(native: dict[str, Tensor], names: list[str], controlnet: bool = False) -> dict[str, Tensor]:
    """The weights `names` (diffusers') taken out of a native state dict, as views: no memory of their own."""
    state = {}
    for name in names:
        source, part, parts = native_name(name, controlnet)
        state[name] = native[source].chunk(parts)[part]
    return state
