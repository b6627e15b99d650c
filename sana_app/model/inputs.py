"""Checks at the pipeline's border: what came, what was wanted, what to do, as ValueError before any work is done."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana_app.lines import condition_from_ink, ink_from_rgb

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_hub_id(name: str) -> bool:
    """owner/model, unless a local folder called owner is there."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).parent.is_dir()


def control_tensor(image: Tensor | np.ndarray | Image.Image, height: int, width: int) -> Tensor:
    """Line image -> float32 [B, 3, height, width] in [-1, 1], white lines on black; nothing is resized in silence.

    Tensors are in that form already; PIL images and uint8 arrays [H, W(, 3 or 4)] are drawings in any polarity.
    """
    if torch.is_tensor(image):
        if image.ndim == 3:
            image = image[None]
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(
                f"the control image is a {image.dtype} tensor {list(image.shape)}, wanted a float tensor "
                f"[B, 3, {height}, {width}] in [-1, 1], white lines on black"
            )
        refuse_other_size(image.shape[3], image.shape[2], height, width)
        if not (image.isfinite().all() and image.abs().max() <= 1 + 1e-3):
            raise ValueError("the control image has values outside [-1, 1]: scale it as uint8 / 127.5 - 1")
        return image.float()
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB"))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the control image is a {type(image).__name__}, wanted a tensor, a PIL image or a uint8 array")
    ink = ink_from_rgb(image)
    refuse_other_size(ink.shape[1], ink.shape[0], height, width)
    if height != width:
        raise ValueError(f"a {width}x{height} drawing is not square: give a tensor [1, 3, {height}, {width}] instead")
    return condition_from_ink(ink, height)


def refuse_other_size(came_width: int, came_height: int, height: int, width: int) -> None:
    if (came_height, came_width) != (height, width):
        raise ValueError(
            f"the control image is {came_width}x{came_height}, the picture {width}x{height}: resize the drawing, for "
            f"example with sana_app.lines.condition_from_ink(ink, {height}), or ask for a {came_width}x{came_height} picture"
        )


def expand_batch(x: Tensor, batch: int) -> Tensor:
    """One condition for all pictures, or one each."""
    if len(x) not in (1, batch):
        raise ValueError(f"{len(x)} control images for {batch} pictures: give one, or one each")
    return x.expand(batch, -1, -1, -1)


def check_size(height: int, width: int, multiple: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < multiple or value % multiple:
            raise ValueError(f"{name} is {value!r}, wanted a positive multiple of {multiple} pixels")


def check_prompt(prompt, embeds: Tensor | None, mask: Tensor | None, caption_channels: int) -> None:
    if (prompt is None) == (embeds is None):
        raise ValueError("give either prompt or prompt_embeds" + (", not both" if embeds is not None else ""))
    if embeds is None:
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt)
        ):
            raise ValueError(f"prompt is {prompt!r}, wanted a text or a list of texts")
        return
    if embeds.ndim != 3 or embeds.shape[2] != caption_channels:
        raise ValueError(f"prompt_embeds are {list(embeds.shape)}, wanted [B, L, {caption_channels}]")
    if mask is None or mask.shape != embeds.shape[:2]:
        got = None if mask is None else list(mask.shape)
        raise ValueError(f"prompt_attention_mask is {got}, wanted {list(embeds.shape[:2])} beside prompt_embeds")


def check_options(seed, generator, output_type: str, conditioning_scale: float, guidance_scale: float) -> None:
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator, not both")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed is {seed!r}, wanted a whole number from 0")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}, wanted one of {', '.join(OUTPUT_TYPES)}")
    for name, value in (("controlnet_conditioning_scale", conditioning_scale), ("guidance_scale", guidance_scale)):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, wanted a finite number")


def check_parts_fit(vae, text_encoder, transformer, controlnet) -> None:
    """Parts of different models in one folder: refused by the numbers that disagree. None = part not loaded."""
    if transformer is None:
        return
    config = transformer.config
    wanted = {}
    if vae is not None:
        wanted["vae latent_channels"] = (vae.config.latent_channels, "in_channels", config.in_channels)
    hidden_size = getattr(getattr(text_encoder, "config", None), "hidden_size", None)
    if hidden_size is not None:
        wanted["text encoder hidden_size"] = (hidden_size, "caption_channels", config.caption_channels)
    if controlnet is not None:
        for key in ("in_channels", "num_attention_heads", "attention_head_dim", "patch_size", "caption_channels", "guidance_embeds"):
            wanted[f"controlnet {key}"] = (controlnet.config[key], key, config[key])
        if controlnet.config.num_layers >= config.num_layers:
            raise ValueError(
                f"the ControlNet has {controlnet.config.num_layers} blocks, the transformer {config.num_layers}: "
                "it may have at most one less"
            )
    for part, (came, key, expected) in wanted.items():
        if came != expected:
            raise ValueError(f"{part} is {came}, but the transformer has {key} {expected}: parts of two models are mixed")
