"""Training batches from the caches: picture latent, lines latent, caption; a pure function of the step's draws.

Augmentation is not timm's: its transforms draw from the global generators of whichever process runs them, while a batch here must be a
pure function of seed and step on any number of processes. And they mirror any picture, whose captions must stay true (frames.may_flip).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC

from training.text import encoder_folders, lazy_text_encoder
from training.base import tile
from training.conditions import condition_key, condition_maker
from training.config import Config
from training.balance import load_weights, row_weights
from training.data.cache import Pixels, Reading, join_pixels, pixel_sets
from training.data.latents import Latents, join_latents, latent_cache
from training.data.sources import has_held_out, list_shards, parse_mixture
from training.data.texts import Texts, folder_hash, text_cache
from training.distributed import is_main, main_first
from training.loop import Draws, autocast, device, maybe_compile
from training.regions import weight_map


@dataclass
class Batch:
    """x0, cond: unit-variance latents [B, C, h, w]; text [B, L, D] and mask [B, L], null_* the empty prompt's.

    weight: loss weights of the regions [B, 1, h, w], of mean 1 a picture (regions.py); rows, inks: the pictures' and drawings' numbers in their shelf.
    """

    x0: torch.Tensor
    cond: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    null_text: torch.Tensor
    null_mask: torch.Tensor
    rows: np.ndarray
    captions: list[str]
    weight: torch.Tensor | None = None
    shelf: int = 0
    inks: np.ndarray | None = None

    def split(self, count: int) -> list[Batch]:
        """The batch in parts of at most `count` samples."""
        cut = lambda value, start: value[start:start + count] if isinstance(value, (torch.Tensor, np.ndarray, list)) else value
        return [Batch(*(cut(value, start) for value in vars(self).values())) for start in range(0, len(self.captions), count)]


@dataclass
class Shelf:
    """All pictures of one shape. `cumulative` [N]: running sum of their weights, from which they are drawn."""

    pixels: Pixels
    latents: Latents
    cumulative: np.ndarray


class Corpus:
    """One split of the data with everything cached that a denoiser needs.

    `shelves` hold the pictures by shape, one shelf without buckets; `pixels` and `latents` are the largest one's, which `fixed`
    batches come from. With several processes the main one fills the caches, the others wait for it.
    """

    def __init__(self, config: Config, out: Path, split: str):
        self.config = config
        folder = Path(config.vae) if config.vae else out / "autoencoder" / "vae"
        sources = parse_mixture(config.data)
        if not (folder / "config.json").exists():
            list_shards(sources[0][0], split)  # missing data are the first thing to be said
            raise ValueError(f"no autoencoder at {folder}: run the autoencoder stage first, put one there, or set vae to a folder with one")
        self.vae = AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32).to(device()).eval()
        if config.size_px % self.vae.spatial_compression_ratio:
            raise ValueError(f"size_px={config.size_px}: wanted a multiple of {self.vae.spatial_compression_ratio}, by which the autoencoder at {folder} compresses")
        if split == "val" and is_main():
            for loose in (spec for spec, _ in sources if not has_held_out(spec)):
                print(f"{loose} has no held-out part (val-*.tar shards): validation and previews use the training pictures")
        vae_key = f"{(folder / 'config.json').read_text()}{weights_hash(self.vae)}"
        if config.vae_tiling:
            tile(self.vae, config.vae_tiling)
            vae_key += f" tiles {config.vae_tiling}"

        def encode_pictures(x: torch.Tensor) -> torch.Tensor:
            with autocast(config):
                return self.vae.encode(x.to(device()), return_dict=False)[0].float() * self.vae.config.scaling_factor
        encode_pictures = maybe_compile(config.compile, encode_pictures)
        cache, text_key = out / "cache", encoder_key(config)  # a text encoder that is not there is said before the pictures are read
        latents = lambda p: latent_cache(p, encode_pictures, f"{vae_key} {config.precision}", cache, config.encode_batch, vae_key)
        each = (lambda sets: [latents(p) for p in sets]) if split == "train" and not config.keep_pixels else None
        reading = reading_of(config, split, self.vae.spatial_compression_ratio)
        maker = condition_maker(config.condition, config.condition_weights)
        condition = condition_key(config.condition, config.condition_weights)
        with main_first():
            sets = [pixel_sets(spec, split, config.size_px, cache, condition, maker, reading, each) for spec, _ in sources]
            captions = [c for of_source in sets for p in of_source for cs in p.captions for c in cs]
            self.texts = cached_texts(captions + [""], config, text_key, cache)
            found = [[(p, latents(p)) for p in of_source] for of_source in sets]
        keys = {spec: [key for p in of_source for key in p.keys] for (spec, _), of_source in zip(sources, sets)}
        balance = load_weights(config.balance, keys) if config.balance and split == "train" else {}
        by_shape: dict[tuple, list[tuple[Pixels, Latents, np.ndarray]]] = {}
        for (spec, share), of_source in zip(sources, found):
            weights = [row_weights(p, config, balance.get(spec)) for p, _ in of_source]
            total = np.concatenate(weights).sum()
            for (p, lat), w in zip(of_source, weights):
                by_shape.setdefault(p.images.shape[1:], []).append((p, lat, w / total * share))
        # without buckets this is the plain running sum, bit by bit
        scale = lambda w: w / w.sum() if len(by_shape) > 1 else w
        columns = sorted((tuple(zip(*rows)) for rows in by_shape.values()), key=lambda c: -sum(len(p.meta) for p in c[0]))
        self.shelves = [Shelf(join_pixels(list(p)), join_latents(list(lat)), np.cumsum(scale(np.concatenate(w)))) for p, lat, w in columns]
        self.shelf_cumulative = np.cumsum([sum(float(x.sum()) for x in w) for _, _, w in columns])
        self.pixels, self.latents = self.shelves[0].pixels, self.shelves[0].latents
        self.count = sum(len(shelf.pixels.meta) for shelf in self.shelves) // (1 + reading.augment)  # pictures, without their variants

    def gather(self, rows: np.ndarray, inks: np.ndarray, captions: list[str], number: int = 0) -> Batch:
        """The given pictures of one shelf with the given drawings and captions."""
        shelf = self.shelves[number]

        def load(array: np.ndarray, index: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array[index].astype(np.float32)).to(device())
        text, mask = self.texts.batch(captions)
        null_text, null_mask = self.texts.batch([""] * len(rows))
        x0 = load(shelf.latents.images, rows)
        weight = torch.ones(len(rows), 1, *x0.shape[2:])
        for i, row in enumerate(rows if shelf.pixels.regions else ()):
            if shelf.pixels.regions[row]:
                weight[i, 0] = torch.from_numpy(weight_map(shelf.pixels.regions[row], *x0.shape[2:], self.config.region_weight))
        return Batch(x0, load(shelf.latents.conds, inks), text.to(device()), mask.to(device()),
                     null_text.to(device()), null_mask.to(device()), rows, captions, weight.to(device()), number, inks)

    def draw(self, count: int, draws: Draws) -> Batch:
        """A random batch of one shape: pictures by weight, one of each picture's drawings and captions, some captions empty.

        `count` samples of the whole batch that all processes and micro-batches draw alike (Draws.mine). A shelf comes with the
        weight of all its pictures, so that over the steps every picture comes with its own."""
        rng, mine = draws.numpy, draws.mine(count)
        choose = lambda cumulative, u: np.minimum(np.searchsorted(cumulative, u), len(cumulative) - 1)
        number = int(choose(self.shelf_cumulative, rng.random())) if len(self.shelves) > 1 else 0
        pixels = self.shelves[number].pixels
        rows = choose(self.shelves[number].cumulative, rng.random(count * draws.world))
        first = pixels.first_ink
        inks = np.array([rng.integers(first[r], first[r + 1]) for r in rows])
        captions = [str(rng.choice(pixels.captions[r])) if rng.random() >= self.config.caption_dropout else "" for r in rows]
        return self.gather(rows[mine], inks[mine], captions[mine], number)

    def fixed(self, count: int) -> Batch:
        """The same evenly spread pictures of the largest shelf every time, first drawing, first caption: for previews and validation."""
        wanted = [i for i, m in enumerate(self.pixels.meta) if not m.get("toned")] or list(range(len(self.pixels.meta)))
        rows = np.array(wanted)[np.linspace(0, len(wanted) - 1, min(count, len(wanted))).astype(int)]
        return self.gather(rows, self.pixels.first_ink[rows], [self.pixels.captions[r][0] for r in rows])

    def pictures(self, batch: Batch) -> torch.Tensor:
        """The batch's own pictures, [B, 3, H, W] in [-1, 1]."""
        return torch.from_numpy(self.shelves[batch.shelf].pixels.images[batch.rows]).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unit-variance latents [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1], as many at once as are encoded at once."""
        parts = (latents.float() / self.vae.config.scaling_factor).split(self.config.encode_batch)
        return torch.cat([self.vae.decode(part, return_dict=False)[0] for part in parts]).clamp(-1, 1)

    def drawings(self, batch: Batch) -> torch.Tensor:
        """The conditions of `fixed` pictures as a person sees them, [B, 3, H, W] in [-1, 1]: drawings dark on light, colour as it is."""
        inks = np.stack([self.pixels.inks[self.pixels.first_ink[r]] for r in batch.rows])
        if inks.ndim == 4:
            return torch.from_numpy(inks).permute(0, 3, 1, 2).float() / 127.5 - 1
        return (1 - torch.from_numpy(inks).float() / 127.5)[:, None].expand(-1, 3, -1, -1)


def reading_of(config: Config, split: str, multiple: int) -> Reading:
    """How the recipe has pictures read; nothing held out is augmented. `multiple`: what the sides of a bucket must divide by, px."""
    table = None
    if config.buckets:
        from training.data.buckets import bucket_table
        table = bucket_table(config.size_px, multiple)
    return Reading(table, config.augment if split == "train" else 0, config.augment_crop, config.region_detector, config.cache_part_mb)


def cached_texts(captions: list[str], config: Config, key: str, cache: Path) -> Texts:
    """Token states of the captions. The text encoder is loaded where some are missing, and is gone when this returns."""
    encode_text = lazy_text_encoder(config.text_encoder, config.max_tokens)

    def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(config):
            return encode_text(prompts)
    return text_cache(captions, encode, key, cache, 4 * config.encode_batch, f"{config.text_encoder} {config.max_tokens}" if config.text_encoder == "minilm" else "")


def encoder_key(config: Config) -> str:
    """What the token states depend on."""
    content = ""
    if config.text_encoder != "minilm":
        prompt = Path(config.text_encoder) / "prompt.json"
        content = " ".join(folder_hash(f) for f in encoder_folders(config.text_encoder)) + (prompt.read_text() if prompt.exists() else "")
    return f"{content or 'minilm'} {config.max_tokens} {config.precision}"


def weights_hash(module: torch.nn.Module) -> str:
    """Content hash of a module's weights."""
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
