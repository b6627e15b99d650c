"""Training batches from the caches: picture latent, lines latent, caption; a pure function of the step's draws."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC

from training.text import load_text_encoder
from training.base import tile
from training.conditions import condition_maker
from training.config import Config
from training.data.cache import Latents, Pixels, Texts, latent_cache, pixel_cache, text_cache
from training.loop import Draws, autocast, device, maybe_compile


@dataclass
class Batch:
    """x0, cond: unit-variance latents [B, C, h, w]; text [B, L, D] and mask [B, L], null_* the empty prompt's."""

    x0: torch.Tensor
    cond: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    null_text: torch.Tensor
    null_mask: torch.Tensor
    rows: np.ndarray
    captions: list[str]


class Corpus:
    """One split with everything cached that a denoiser needs."""

    def __init__(self, config: Config, out: Path, split: str):
        self.config = config
        cache = out / "cache"
        self.pixels: Pixels = pixel_cache(config.data, split, config.size_px, cache, config.condition, condition_maker(config.condition, config.condition_weights))
        folder = Path(config.vae) if config.vae else out / "autoencoder" / "vae"
        if not (folder / "config.json").exists():
            raise ValueError(f"no autoencoder at {folder}: run the autoencoder stage first, put one there, or set vae to a folder with one")
        self.vae = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32).to(device()).eval()
        vae_key = f"{(folder / 'config.json').read_text()}{weights_hash(self.vae)}"
        if config.vae_tiling:
            tile(self.vae, config.vae_tiling)
            vae_key += f" tiles {config.vae_tiling}"

        def encode_pictures(x: torch.Tensor) -> torch.Tensor:
            with autocast(config):
                return self.vae.encode(x.to(device()), return_dict=False)[0].float() * self.vae.config.scaling_factor
        encode_pictures = maybe_compile(config.compile, encode_pictures)
        self.latents: Latents = latent_cache(self.pixels, encode_pictures, vae_key, cache)
        encode_text = load_text_encoder(config.text_encoder, config.max_tokens)[2]

        def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            with autocast(config):
                return encode_text(prompts)
        self.texts: Texts = text_cache([c for cs in self.pixels.captions for c in cs] + [""], encode, f"{config.text_encoder} {config.max_tokens}", cache)
        weights = np.array([config.toned_weight if m.get("toned") else 1.0 for m in self.pixels.meta])
        self.cumulative = np.cumsum(weights / weights.sum())

    def gather(self, rows: np.ndarray, inks: np.ndarray, captions: list[str]) -> Batch:
        """The given pictures with the given drawings and captions."""
        def load(array: np.ndarray, index: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[index].astype(np.float32)).to(device())
        text, mask = self.texts.batch(captions)
        null_text, null_mask = self.texts.batch([""] * len(rows))
        return Batch(load(self.latents.images, rows), load(self.latents.conds, inks), text.to(device()), mask.to(device()),
                     null_text.to(device()), null_mask.to(device()), rows, captions)

    def draw(self, count: int, draws: Draws) -> Batch:
        """A random batch: pictures by weight, one of each picture's drawings and captions, some captions empty.

        `count` samples of the whole batch that all processes and micro-batches draw alike (Draws.mine)."""
        rng, mine = draws.numpy, draws.mine(count)
        rows = np.minimum(np.searchsorted(self.cumulative, rng.random(count * draws.world)), len(self.cumulative) - 1)
        first = self.pixels.first_ink
        inks = np.array([rng.integers(first[r], first[r + 1]) for r in rows])
        captions = [str(rng.choice(self.pixels.captions[r])) if rng.random() >= self.config.caption_dropout else "" for r in rows]
        return self.gather(rows[mine], inks[mine], captions[mine])

    def fixed(self, count: int) -> Batch:
        """The same evenly spread pictures every time, first drawing, first caption: for previews and validation."""
        wanted = [i for i, m in enumerate(self.pixels.meta) if not m.get("toned")] or list(range(len(self.pixels.meta)))
        rows = np.array(wanted)[np.linspace(0, len(wanted) - 1, min(count, len(wanted))).astype(int)]
        return self.gather(rows, self.pixels.first_ink[rows], [self.pixels.captions[r][0] for r in rows])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unit-variance latents [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1]."""
        return self.vae.decode(latents.float() / self.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)

    def drawings(self, batch: Batch) -> torch.Tensor:
        """The conditions of `fixed` pictures as a person sees them, [B, 3, H, W] in [-1, 1]: drawings dark on light, colour as it is."""
        inks = np.stack([self.pixels.inks[self.pixels.first_ink[r]] for r in batch.rows])
        if inks.ndim == 4:
            return torch.from_numpy(inks).permute(0, 3, 1, 2).float() / 127.5 - 1
        return (1 - torch.from_numpy(inks).float() / 127.5)[:, None].expand(-1, 3, -1, -1)


def weights_hash(module: torch.nn.Module) -> str:
    """Content hash of a module's weights."""
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
