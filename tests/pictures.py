"""Folders of small pictures, a corpus over them with random-weight networks, and a run folder to distil from."""

import json
from pathlib import Path

import cv2
import numpy as np

from layouts import randomised, tiny_bert, tiny_controlnet, tiny_transformer, tiny_vae
from training.base import save_folder
from training.batches import Corpus
from training.config import Config
from training.data.shards import Sample, ShardWriter, encode_png


def picture(number: int, height: int = 32, width: int = 32) -> np.ndarray:
    """A figure over white, RGB, different for each number."""
    rng = np.random.default_rng(number)
    image = np.full((height, width, 3), 255, np.uint8)
    centre = (int(rng.integers(width // 4, 3 * width // 4)), int(rng.integers(height // 4, 3 * height // 4)))
    cv2.circle(image, centre, int(rng.integers(4, max(5, min(height, width) // 4))), rng.integers(0, 200, 3).tolist(), -1)
    return image


def write_pictures(folder: Path, count: int, shape=(32, 32), first: int = 0, **about) -> Path:
    """NAME.png + NAME.json; `shape` and the values of `about` may be functions of the number."""
    folder.mkdir(parents=True, exist_ok=True)
    value = lambda v, i: v(i) if callable(v) else v
    for i in range(first, first + count):
        (folder / f"p{i:03d}.png").write_bytes(encode_png(picture(i, *value(shape, i))))
        (folder / f"p{i:03d}.json").write_text(json.dumps({"caption": f"the cat {i}"} | {k: value(v, i) for k, v in about.items()}))
    return folder


def write_shards(folder: Path, count: int, per_shard: int, prefix: str = "train") -> list[Path]:
    """Tar files with pictures, their lines and captions."""
    writer = ShardWriter(folder, prefix, per_shard)
    for i in range(count):
        image = picture(i)
        writer.write(Sample(f"p{i:03d}", image, [cv2.Canny(image, 50, 100)], [f"the cat {i}"], {}))
    writer.close()
    return writer.paths


def write_networks(folder: Path) -> Path:
    """FOLDER/vae (8 px a latent cell, 8 channels), text_encoder/ and tokenizer/."""
    tiny_vae().save_pretrained(folder / "vae")
    tokenizer, encoder = tiny_bert()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def open_corpus(networks: Path, out: Path, data: Path | str, split: str = "train", **settings) -> Corpus:
    values = dict(data=str(data), vae=str(networks / "vae"), text_encoder=str(networks), size_px=32, precision="fp32", encode_batch=8) | settings
    return Corpus(Config(**values), out, split)


def start_distillation(root: Path, data: Path, **settings) -> tuple[Config, Path]:
    """A recipe over `data` and a run folder in which the ControlNet stage is done; the teacher's weights are random, its lines count."""
    networks = write_networks(root / "networks")
    teacher = tiny_transformer(qk_norm="rms_norm_across_heads", timestep_scale=0.001, guidance_embeds=False)
    save_folder(root / "out" / "controlnet", {"transformer": teacher, "controlnet": randomised(tiny_controlnet(teacher), 3)})
    values = dict(data=str(data), vae=str(networks / "vae"), text_encoder=str(networks), size_px=32, precision="fp32", encode_batch=8, tracker="none", preview_steps=0,
                  lr_warmup_steps=1, ema=0.9, student_steps=4, student_batch=4, disc_blocks=(0, 1)) | settings
    return Config(**values), root / "out"
