"""Stage 7: the model folder that the app and stock diffusers load: half precision, safetensors.

    python -m training export --recipe emoji-128     ->  runs/emoji-128/model
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel, SCMScheduler

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from training.conditions import CONDITION_FILE
from training.config import Config
from training.text import load_text_encoder, settings_of


def export_model(config: Config, out: Path) -> None:
    """Puts the stages' results together in OUT/model and loads it once to prove that it loads."""
    vae = "decoder/vae" if config.decoder_steps else "autoencoder/vae"
    for part in (vae, "student/transformer", "student/controlnet"):
        if not (out / part / "config.json").exists():
            raise ValueError(f"{out / part} is missing: run the {part.split('/')[0]} stage first")
    tokenizer, text_encoder, _ = load_text_encoder(config.text_encoder, config.max_tokens)
    pipe = SanaSprintControlNetPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=AutoencoderDC.from_pretrained(out / vae),
        transformer=SanaTransformer2DModel.from_pretrained(out / "student" / "transformer"), scheduler=SCMScheduler(),
        controlnet=SanaSprintControlNetModel.from_pretrained(out / "student" / "controlnet"))
    pipe.text_settings = settings_of(config.text_encoder, text_encoder, config.max_tokens)
    pipe.noise_scale = config.noise_scale
    pipe.to("cpu", torch.float16)
    pipe.save_pretrained(out / "model")
    about = out / "student" / "controlnet" / CONDITION_FILE
    if about.exists():
        shutil.copy2(about, out / "model" / "controlnet")
    SanaSprintControlNetPipeline.from_pretrained(out / "model")
    size = sum(p.stat().st_size for p in (out / "model").rglob("*") if p.is_file())
    print(f"wrote {out / 'model'}: {size / 2**20:.1f} MB")
