"""What a native checkpoint is: its kind and its diffusers config, read off the tensors; what they cannot tell is asked for."""

from __future__ import annotations

import math
import re

from torch import Tensor

KINDS = ("base", "teacher", "sprint", "controlnet")
PUBLISHED = {(1152, 28): "0.6B", (2240, 20): "1.6B", (2240, 60): "4.8B"}   # (width, blocks) -> size
CROSS_HEADS = {1152: 16, 2240: 20}                                         # width -> cross-attention heads, as published
INTERPOLATION = {512: None, 1024: None, 2048: 1.0, 4096: 2.0}              # px -> scale of the position embedding, as published
PX_PER_LATENT = 32                                                         # DC-AE f32


def block_numbers(native: dict[str, Tensor], prefix: str) -> int:
    """Number of blocks = largest number + 1; a gap then shows as missing weights."""
    return 1 + max((int(m[1]) for m in (re.match(rf"{prefix}\.(\d+)\.", k) for k in native) if m), default=-1)


def find_kind(native: dict[str, Tensor], kind: str, timestep_scale: float | None) -> tuple[str, list[str]]:
    """The kind that was asked for, or the one the tensors show; ValueError when they show two."""
    if kind not in (*KINDS, "auto"):
        raise ValueError(f"unknown kind {kind!r}: wanted auto, {', '.join(KINDS)}")
    if kind != "auto":
        return kind, []
    if any(k.startswith("controlnet.") for k in native):
        return "controlnet", []
    if any(k.startswith("cfg_embedder.") for k in native):
        return "sprint", []
    if not any(".q_norm." in k for k in native):
        return "base", []
    if timestep_scale is not None:
        return ("teacher" if 1000 * timestep_scale == 1 else "base"), []
    depth = block_numbers(native, "blocks")
    if depth == 60:
        return "base", ["60 blocks with qk-norm: taken for SANA-1.5 4.8B, times 0..1000 (a teacher with times in [0, 1]: --kind teacher)"]
    raise ValueError(
        f"qk-norm, no guidance embedding, {depth} blocks: SANA-1.5 (times 0..1000) and a Sprint teacher (times in [0, 1]) have "
        "the same tensors, and the wrong one gives noise; say which: --kind base or --kind teacher"
    )


def find_timestep_scale(kind: str, guidance: bool, qk_norm: bool) -> float:
    """timestep_scale of a kind: base SANA sees s * 1000, teachers and Sprint models see s (maths: s * 1000 * 0.001)."""
    if kind != "controlnet":
        return 1.0 if kind == "base" else 0.001
    if guidance or not qk_norm:
        return 0.001 if guidance else 1.0
    raise ValueError(
        "a ControlNet with qk-norm and no guidance embedding belongs to SANA-1.5 or to a Sprint teacher: "
        "say --timestep-scale 1.0 (times 0..1000) or --timestep-scale 0.001 (times in [0, 1])"
    )


def find_size(native: dict[str, Tensor], patch: int, image_px: int | None, interpolation: float | None) -> tuple[dict, list[str]]:
    """sample_size (side of the latent) and interpolation_scale (None = no position embedding).

    NVlabs' models always carry a buffer pos_embed [1, patches, width]; it is zero where it is not used (512, 1024 px).
    interpolation: as given, 0 = none.
    """
    notes, used = [], None
    if (pos := native.get("pos_embed")) is not None:
        side = math.isqrt(pos.shape[1])
        if side * side != pos.shape[1]:
            raise ValueError(f"pos_embed has {pos.shape[1]} positions, wanted a square number")
        used, image_px = bool(pos.any()), image_px or side * patch * PX_PER_LATENT
    elif image_px is None:
        image_px = 1024
        notes.append("no pos_embed in the file: taken for a 1024 px model (--image-size 512, 2048 or 4096 otherwise)")
    if image_px % PX_PER_LATENT:
        raise ValueError(f"image size {image_px}: wanted a multiple of {PX_PER_LATENT}, the autoencoder's reduction")
    scale = INTERPOLATION.get(image_px) if interpolation is None else interpolation or None
    if interpolation is None and used is not None and used != (scale is not None):
        raise ValueError(
            f"pos_embed is {'in use' if used else 'all zero'}, but a published {image_px} px model has "
            f"{'a' if scale else 'no'} position embedding: give --interpolation-scale (0 = none; 1 at 2048 px, 2 at 4096 px)"
        )
    return dict(sample_size=image_px // PX_PER_LATENT, interpolation_scale=scale), notes


def find_mlp_ratio(hidden: int, width: int) -> float:
    """The ratio with int(ratio * width) == hidden, 2.5 (as published) if it does."""
    return next(r for r in (2.5, hidden / width, (hidden + 0.5) / width) if int(r * width) == hidden)


def describe(
    native: dict[str, Tensor],
    kind: str = "auto",
    cross_heads: int | None = None,
    head_dim: int = 32,
    image_px: int | None = None,
    interpolation: float | None = None,
    timestep_scale: float | None = None,
) -> tuple[str, dict, list[str]]:
    """Kind, diffusers config and notes for a person. ValueError names what the tensors cannot tell.

    cross_heads: cross-attention heads (known for the published widths). head_dim: of the self attention (32 in all
    published models). image_px: side of the pictures. interpolation: scale of the position embedding, 0 = none.
    """
    kind, notes = find_kind(native, kind, timestep_scale)
    prefix = "controlnet" if kind == "controlnet" else "blocks"
    block = f"{prefix}.0.copied_block" if kind == "controlnet" else f"{prefix}.0"
    needed = {
        "patch": "x_embedder.proj.weight", "caption": "y_embedder.y_proj.fc1.weight",
        "mlp": f"{block}.mlp.inverted_conv.conv.weight", "out": "final_layer.linear.weight",
    }  # fmt: skip
    absent = [k for role, k in needed.items() if k not in native and not (kind == "controlnet" and role == "out")]
    if absent:
        raise ValueError(f"not a SANA {kind} checkpoint: it has no {', '.join(absent)}; it has {', '.join(list(native)[:5])} …")
    shapes = {role: tuple(native[k].shape) for role, k in needed.items() if k in native}
    if [len(shapes["patch"]), len(shapes["caption"]), len(shapes["mlp"])] != [4, 2, 4] or shapes["patch"][2] != shapes["patch"][3]:
        raise ValueError(f"{', '.join(f'{needed[r]} is {list(s)}' for r, s in shapes.items())}: not an image model of SANA")
    width, in_channels, patch, _ = shapes["patch"]
    depth = block_numbers(native, prefix)
    guidance = kind == "sprint" or (kind == "controlnet" and any(k.startswith("cfg_embedder.") for k in native))
    qk_norm = kind in ("sprint", "teacher") or any(k.startswith(prefix) and (".q_norm." in k or ".k_norm." in k) for k in native)
    cross_heads = cross_heads or CROSS_HEADS.get(width)
    if cross_heads is None:
        raise ValueError(
            f"width {width} is none of the published {', '.join(map(str, CROSS_HEADS))}, and the number of cross-attention heads is "
            "not in the tensors: give --cross-heads"
        )
    if width % head_dim or width % cross_heads:
        raise ValueError(f"width {width} does not divide into heads of {head_dim} and {cross_heads} cross-attention heads: see --head-dim, --cross-heads")
    if timestep_scale is None:
        timestep_scale = find_timestep_scale(kind, guidance, qk_norm)
    size, more = find_size(native, patch, image_px, interpolation)
    config = dict(
        _class_name="SanaTransformer2DModel" if kind != "controlnet"
        else "SanaSprintControlNetModel" if guidance or qk_norm else "SanaControlNetModel",
        in_channels=in_channels, out_channels=shapes["out"][0] // patch**2 if "out" in shapes else in_channels,
        num_attention_heads=width // head_dim, attention_head_dim=head_dim, num_layers=depth,
        num_cross_attention_heads=cross_heads, cross_attention_head_dim=width // cross_heads, cross_attention_dim=width,
        caption_channels=shapes["caption"][1], mlp_ratio=find_mlp_ratio(shapes["mlp"][0] // 2, width), dropout=0.0,
        attention_bias=f"{block}.attn.qkv.bias" in native, patch_size=patch, norm_elementwise_affine=False, norm_eps=1e-6,
        guidance_embeds=guidance, guidance_embeds_scale=0.1, qk_norm="rms_norm_across_heads" if qk_norm else None,
        timestep_scale=timestep_scale, **size,
    )  # fmt: skip
    name = PUBLISHED.get((width, depth), "not a published size") if kind != "controlnet" else f"{depth} copied blocks"
    notes.insert(0, f"{kind}: width {width}, {depth} blocks ({name}), qk-norm {'yes' if qk_norm else 'no'}, timestep_scale {timestep_scale}")
    taken = f"{head_dim} channels a head, {cross_heads} cross-attention heads" + (", guidance_embeds_scale 0.1" if guidance else "")
    return kind, config, notes + more + [f"not in the tensors, taken as published or given: {taken}"]
