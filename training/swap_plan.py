"""Stage (a) of a swap: the new part alone, measured against the old, before anything is trained.

Finds what does not fit (channels, compression, scale, offset, prompt length) and refuses a part that cannot do its own work.
Also: the same latent with a better or faster decoder needs no training at all.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import nn

from sana_app.model.folder import read_json
from sana_app.model.text import cut_off
from training.autoencoder import psnr_db
from training.base import load_part, tile
from training.config import Config
from training.data.cache import Pixels
from training.loop import autocast, device
from training.monitor import statistics
from training.text import load_text_encoder, settings_of

SCALE_TOLERANCE = 1.25  # a latent std this many times the known one, or as much below, is a mismatch
SAME_LATENT_DB = 1.0    # the new decoder may lose this much on the old encoder's latents and still count as one of that latent
COLLAPSED = 1e-3        # mean cosine distance of different captions below which an encoder tells them apart no more


@dataclass
class Plan:
    """What stage (a) found. `findings` are sentences for a person, `numbers` go into report.json."""

    vae: str = ""                 # "", "same latent", "new latent"
    text: bool = False            # whether the text encoder is swapped
    joint: bool = False           # whether the text encoder is tuned with the rest
    scaling_factor: float = 0.0   # of the autoencoder in the swapped model
    text_rms: float = 1.0         # root mean square of the new text states: the new projection is scaled by it
    findings: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.vae == "new latent" or self.text or self.joint


def vae_folder(name: str) -> Path:
    """The AutoencoderDC folder meant by `name`: itself, or vae/ in a model folder."""
    folder = Path(name)
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != AutoencoderDC.__name__:
        raise ValueError(f"vae={name} is a {kind}, wanted an AutoencoderDC: SANA's pipelines know no other (no shift, one latent frame)")
    return folder


# ---- autoencoder -----------------------------------------------------------------------------------------------------


def _batches(pixels: Pixels, count: int, size: int = 8) -> list[torch.Tensor]:
    """`count` evenly spread pictures -> list of [b, 3, S, S] in [-1, 1]."""
    rows = np.linspace(0, len(pixels.images) - 1, min(count, len(pixels.images))).astype(int)
    return [torch.from_numpy(np.array(pixels.images[rows[i:i + size]])).permute(0, 3, 1, 2).float().to(device()) / 127.5 - 1
            for i in range(0, len(rows), size)]


@torch.no_grad()
def encode(vae: AutoencoderDC, x: torch.Tensor, config: Config) -> torch.Tensor:
    """Raw latents, no scaling factor: [B, 3, S, S] -> [B, C, h, w] float32."""
    with autocast(config):
        return vae.encode(x, return_dict=False)[0].float()


@torch.no_grad()
def decode(vae: AutoencoderDC, z: torch.Tensor, config: Config) -> torch.Tensor:
    with autocast(config):
        return vae.decode(z, return_dict=False)[0].float()


def measure_autoencoder(vae: AutoencoderDC, pictures: list[torch.Tensor], config: Config) -> dict:
    """Reconstruction, latents and decoding time of one autoencoder; `latents` is a tensor [N, C, h, w], all else numbers."""
    latents, scores, seconds = [], [], []
    for x in pictures:
        latents.append(encode(vae, x, config))
        start = time.perf_counter()
        y = decode(vae, latents[-1], config)
        scores.append(psnr_db(y, x))
        seconds.append((time.perf_counter() - start) / len(x))
    z = torch.cat(latents)
    stats = statistics(z)
    return {"latents": z, "channels": z.shape[1], "compression": vae.spatial_compression_ratio, "psnr_db": float(torch.cat(scores).mean()),
            "std": float(z.std()), "channel_mean": stats["mean"], "channel_std": stats["std"], "scaling_factor": vae.config.scaling_factor,
            "decode_ms": 1000 * min(seconds)}


def same_latent(old: AutoencoderDC, new: AutoencoderDC, a: dict, b: dict, pictures: list[torch.Tensor], config: Config) -> tuple[bool, dict]:
    """Whether the new decoder reads the old encoder's latents: as well as the old one does, or as its own encoder's.

    Equal encoders say so by themselves. Else the reconstruction must come within SAME_LATENT_DB of the own one, and be far
    better than a plain picture of the mean colour, which two decoders that know nothing have in common.
    """
    if (a["channels"], a["compression"]) != (b["channels"], b["compression"]):
        return False, {}
    z = a["latents"]
    difference = float((b["latents"] - z).norm() / (z - z.mean(dim=(0, 2, 3), keepdim=True)).norm())
    crossed = [psnr_db(decode(new, part.to(device()), config), x) for part, x in zip(z.split([len(x) for x in pictures]), pictures)]
    plain = [psnr_db(x.mean(dim=(2, 3), keepdim=True).expand_as(x), x) for x in pictures]
    crossed_db, plain_db = float(torch.cat(crossed).mean()), float(torch.cat(plain).mean())
    reads = crossed_db >= min(a["psnr_db"], b["psnr_db"]) - SAME_LATENT_DB and crossed_db > plain_db + 3
    return difference < 0.02 or reads, {"encoding_difference": difference, "psnr_db_on_old_latents": crossed_db}


def examine_autoencoder(plan: Plan, old_folder: Path, new_folder: Path, pixels: Pixels, config: Config, count: int = 64) -> None:
    """Fills the plan: kind of swap, scaling factor, findings, unfitness."""
    old, new = (load_part(f, AutoencoderDC).to(device()).eval() for f in (old_folder, new_folder))
    for vae in (old, new):
        if config.size_px % vae.spatial_compression_ratio:
            raise ValueError(f"size_px={config.size_px} is no multiple of the autoencoder's compression {vae.spatial_compression_ratio}: change size_px")
        if config.vae_tiling:
            tile(vae, config.vae_tiling)
    pictures = _batches(pixels, count)
    a, b = measure_autoencoder(old, pictures, config), measure_autoencoder(new, pictures, config)
    same, crossed = same_latent(old, new, a, b, pictures, config)
    plan.numbers["autoencoder"] = {"pictures": sum(len(x) for x in pictures), **crossed,
                                   **{k: {n: v for n, v in m.items() if n != "latents"} for k, m in (("old", a), ("new", b))}}
    say = plan.findings.append
    say(f"reconstruction of {len(a['latents'])} held-out pictures: {a['psnr_db']:.2f} dB -> {b['psnr_db']:.2f} dB; "
        f"decoding {a['decode_ms']:.1f} -> {b['decode_ms']:.1f} ms a picture here")
    if not math.isfinite(b["psnr_db"]) or b["psnr_db"] < a["psnr_db"] - config.swap_psnr_drop_db:
        plan.unfit.append(f"the new autoencoder reconstructs {a['psnr_db'] - b['psnr_db']:.1f} dB worse than the old one (allowed: "
                          f"swap_psnr_drop_db={config.swap_psnr_drop_db:g}). No denoiser can be sharper than its autoencoder: train it further on "
                          "this data, or choose another")
    if same and fits_together(old, new):
        plan.vae, plan.scaling_factor = "same latent", a["scaling_factor"]
        say(f"same latent: the new decoder reads the old encoder's latents at {crossed['psnr_db_on_old_latents']:.2f} dB. A drop-in: the old encoder and "
            "the old scaling_factor stay, only the decoder is exchanged, and nothing needs training")
        if b["scaling_factor"] != a["scaling_factor"]:
            say(f"scaling_factor {b['scaling_factor']:g} of the new folder is put right: {a['scaling_factor']:g}, as the transformer was trained")
        return
    plan.vae = "new latent"
    if a["channels"] != b["channels"]:
        say(f"latent channels {a['channels']} -> {b['channels']}")
    else:
        say(f"latent channels fit ({a['channels']}), but it is another latent: the layers are kept and must learn it"
            + ("" if config.swap_reinit else " (swap_reinit=true starts them anew)"))
    if a["compression"] != b["compression"]:
        tokens = [(config.size_px // m["compression"]) ** 2 for m in (a, b)]
        say(f"compression {a['compression']} -> {b['compression']}: {tokens[0]} -> {tokens[1]} tokens a picture of {config.size_px} px")
    say_scale(plan, a, b)


def fits_together(old: AutoencoderDC, new: AutoencoderDC) -> bool:
    """Whether one AutoencoderDC can have the old encoder and the new decoder: they share one attention_head_dim."""
    return old.config.attention_head_dim == new.config.attention_head_dim


def say_scale(plan: Plan, old: dict, new: dict) -> None:
    """The scaling factor that gives the new latents the std the transformer knows, and what one number cannot put right."""
    known = old["scaling_factor"] * old["std"]
    came = new["scaling_factor"] * new["std"]
    suggested = round(known / new["std"], 5)
    off = max(came / known, known / came)
    plan.scaling_factor = new["scaling_factor"] if off <= SCALE_TOLERANCE else suggested
    plan.numbers["autoencoder"]["suggested_scaling_factor"] = suggested
    verdict = "it is kept" if off <= SCALE_TOLERANCE else f"MISMATCH, {suggested:g} is used instead"
    plan.findings.append(f"scale: the old latents have std {known:.3f} after scaling, the new ones {came:.3f} with scaling_factor "
                         f"{new['scaling_factor']:g}; suggested from the measured std: {suggested:g}; {verdict}")
    offset = [math.sqrt(np.mean(np.square(m["channel_mean"]))) / m["std"] for m in (old, new)]
    plan.numbers["autoencoder"]["offset"] = offset
    if offset[1] > max(0.5, 2 * offset[0]):
        plan.findings.append(f"shift: the channels' means lie {offset[1]:.2f} std from zero (old: {offset[0]:.2f}). SANA's pipelines know no shift: "
                             "take the mean off the encoder's last bias and fine-tune the decoder, or train longer")
    uneven = np.array(new["channel_std"]) / new["std"]
    if (dead := np.flatnonzero(uneven < 1e-2)).size:
        plan.findings.append(f"channels {', '.join(map(str, dead))} carry next to nothing (std below 1 % of the whole): fewer channels would do")


def merged_vae(old: AutoencoderDC, new: AutoencoderDC) -> AutoencoderDC:
    """The old encoder and scaling factor with the new decoder."""
    plain = lambda vae: {k: v for k, v in vae.config.items() if not k.startswith("_")}
    of_decoder = {k: v for k, v in plain(new).items() if k.startswith("decoder_") or k == "upsample_block_type"}
    merged = AutoencoderDC.from_config(plain(old) | of_decoder)
    merged.encoder.load_state_dict(old.encoder.state_dict())
    merged.decoder.load_state_dict(new.decoder.state_dict())
    return merged.eval()


def write_vae(plan: Plan, old_folder: Path, new_folder: Path, target: Path) -> None:
    """The autoencoder of the swapped model into TARGET: the new weights bit for bit, with the plan's scaling factor."""
    shutil.rmtree(target, ignore_errors=True)
    if plan.vae == "same latent":
        merged_vae(load_part(old_folder, AutoencoderDC), load_part(new_folder, AutoencoderDC)).save_pretrained(target)
        return
    shutil.copytree(new_folder, target)
    config = read_json(target / "config.json") | {"scaling_factor": plan.scaling_factor}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- text encoder ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_text_encoder(name: str, captions: list[str], config: Config) -> dict:
    """Channels, token counts, norms and how far apart captions lie, of one text encoder."""
    tokenizer, model, encode_prompts = load_text_encoder(name, config.max_tokens)
    settings = settings_of(name, model, config.max_tokens)
    states, pooled, counts = [], [], []
    for i in range(0, len(captions), 16):
        with autocast(config):
            embeds, mask = encode_prompts(captions[i:i + 16])
        for row, keep in zip(embeds.float().cpu(), mask.cpu() > 0):
            states.append(row[keep])
            pooled.append(row[keep].mean(dim=0))
            counts.append(int(keep.sum()))
    x, p = torch.cat(states), nn.functional.normalize(torch.stack(pooled), dim=1)
    pairs = 1 - (p @ p.T)[~torch.eye(len(p), dtype=torch.bool)]
    norms = x.norm(dim=1)
    return {"channels": x.shape[1], "finite": bool(torch.isfinite(x).all()), "tokens_mean": float(np.mean(counts)), "tokens_max": max(counts),
            "cut_share": float(np.mean([bool(c) for c in cut_off(tokenizer, captions, settings)])), "norm_mean": float(norms.mean()),
            "norm_min": float(norms.min()), "norm_max": float(norms.max()), "mean": float(x.mean()), "std": float(x.std()),
            "rms": float(x.square().mean().sqrt()), "caption_distance": float(pairs.mean()) if len(p) > 1 else 1.0, "instruction": bool(settings.instruction)}


def examine_text_encoder(plan: Plan, old: str, new: str, captions: list[str], config: Config) -> None:
    """Fills the plan from the two encoders, loaded one after the other."""
    a, b = (measure_text_encoder(name, captions, config) for name in (old, new))
    plan.text, plan.text_rms = True, b["rms"]
    plan.numbers["text_encoder"] = {"captions": len(captions), "old": a, "new": b}
    say = plan.findings.append
    say(f"text states of {len(captions)} captions: tokens {a['tokens_mean']:.1f} (most {a['tokens_max']}) -> {b['tokens_mean']:.1f} (most {b['tokens_max']}), "
        f"norm {a['norm_mean']:.3g} -> {b['norm_mean']:.3g}, mean {a['mean']:.3g} -> {b['mean']:.3g}, std {a['std']:.3g} -> {b['std']:.3g}")
    say(f"mean cosine distance of different captions: {a['caption_distance']:.3f} -> {b['caption_distance']:.3f}")
    if a["channels"] != b["channels"]:
        say(f"caption channels {a['channels']} -> {b['channels']}")
    else:
        ratio = b["rms"] / a["rms"]
        say(f"caption channels fit ({a['channels']}), but it is another space: the projection is kept and must learn it"
            + ("" if config.swap_reinit else " (swap_reinit=true starts it anew)"))
        if not 1 / 3 < ratio < 3 and not config.swap_reinit:
            say(f"scale: the new states are {ratio:.3g} times as large as those the projection knows. MISMATCH: swap_reinit=true scales a new one to them")
    if b["cut_share"] > a["cut_share"]:
        say(f"{100 * b['cut_share']:.0f} % of the captions are longer than max_tokens={config.max_tokens} with the new tokenizer ({100 * a['cut_share']:.0f} % with the "
            "old): raise max_tokens")
    if a["instruction"] != b["instruction"]:
        say(f"the long instruction before every prompt is {'used' if b['instruction'] else 'not used'} with the new encoder (prompt.json)")
    if not b["finite"] or not math.isfinite(b["rms"]) or b["rms"] == 0:
        plan.unfit.append("the new text encoder gives NaN, infinite or all-zero states: load it in float32 or bfloat16, or choose another")
    elif b["caption_distance"] < COLLAPSED and len(captions) > 1:
        plan.unfit.append(f"the new text encoder hardly tells captions apart (mean cosine distance {b['caption_distance']:.1e}): it is untrained or broken")
