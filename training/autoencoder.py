"""Stage 1: a small deep-compression autoencoder (stock AutoencoderDC).

Loss: L1 + L1 of finite differences (sharp edges) + L1 at lower resolutions (right colours), and late in the training an
optional adversarial term on patches. No perceptual network is needed. The first part trains on crops, which is several
times cheaper a picture, since the network is fully convolutional.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import nn

from training.config import Config
from training.data.cache import Pixels, pixel_cache
from training.distributed import main_first, refuse_fsdp, save_model, std
from training.loop import Draws, autocast, device, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients, make_optimizer
from training.sheets import contact_sheet


def build_autoencoder(config: Config) -> AutoencoderDC:
    """AutoencoderDC of convolutional blocks; downsampling 2^(stages - 1)."""
    plain = ((),) * len(config.ae_channels)
    return AutoencoderDC(
        in_channels=3, latent_channels=config.ae_latent_channels, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=config.ae_channels, decoder_block_out_channels=config.ae_channels,
        encoder_layers_per_block=config.ae_encoder_layers, decoder_layers_per_block=config.ae_decoder_layers,
        encoder_qkv_multiscales=plain, decoder_qkv_multiscales=plain,
        downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle", scaling_factor=1.0)


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 + 0.5·gradient L1 + 0.5·L1 of 2x and 4x averages. y, x: [B, 3, H, W] in [-1, 1] -> [B]."""
    def l1(a: torch.Tensor) -> torch.Tensor:
        return a.abs().mean(dim=(1, 2, 3))
    error = y - x
    loss = l1(error) + 0.5 * (l1(error.diff(dim=2)) + l1(error.diff(dim=3)))
    for factor in (2, 4):
        loss = loss + 0.25 * l1(F.avg_pool2d(error, factor))
    return loss


class PatchDiscriminator(nn.Module):
    """Three strided convolutions, one logit a patch of about 22 px: judges sharpness, not content."""

    def __init__(self, width: int = 32):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        layers, channels = [], 3
        for out in (width, 2 * width, 4 * width):
            layers += [norm(nn.Conv2d(channels, out, 4, 2, 1)), nn.LeakyReLU(0.2)]
            channels = out
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def picture_batch(pixels: Pixels, config: Config, step: int, draws: Draws) -> torch.Tensor:
    """Random pictures and drawings of one micro-batch, cropped in the first part of the training -> [B, 3, s, s] in [-1, 1]."""
    cropped = step < config.ae_crop_share * config.ae_steps
    size = config.ae_crop_px if cropped else config.size_px
    count = local_batch(config.ae_batch, config) * (config.size_px // size) ** 2
    rng = draws.numpy
    rows = []
    for _ in range(count * draws.world):  # all processes draw the whole batch's numbers, and keep their own rows
        if rng.random() < config.ae_lines_share:
            picture = np.repeat(pixels.inks[rng.integers(len(pixels.inks))][..., None], 3, 2)
        else:
            picture = pixels.images[rng.integers(len(pixels.images))]
        top, left = rng.integers(0, config.size_px - size + 1, 2)
        picture = picture[top:top + size, left:left + size]
        rows.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
    return torch.from_numpy(np.stack(rows[draws.mine(count)])).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_db(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio for pictures in [-1, 1], dB: [B, 3, H, W] twice -> [B]."""
    mse = ((y.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-10))


def train_autoencoder(config: Config, out: Path) -> None:
    """Trains, and writes OUT/autoencoder/vae with the averaged weights and the measured scaling factor."""
    with main_first():
        pixels = pixel_cache(config.data, "train", config.size_px, out / "cache")
        held_out = pixel_cache(config.data, "val", config.size_px, out / "cache")
    refuse_fsdp(config, "the autoencoder is small")
    torch.manual_seed(config.seed)
    vae = build_autoencoder(config).to(device())
    ema = Ema(vae, config.ema)
    opt = make_optimizer([(list(vae.parameters()), config.ae_lr)], config)
    disc = PatchDiscriminator().to(device())
    disc_opt = make_optimizer([(list(disc.parameters()), 0.2 * config.ae_lr)], config)

    def reconstruct(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast(config):
            z = vae.encode(x, return_dict=False)[0]
            z = z + config.ae_latent_noise * std(z) * noise
            return vae.decode(z, return_dict=False)[0].float()

    reconstruct = maybe_compile(config.compile, reconstruct)
    ratio = 2 ** (len(config.ae_channels) - 1)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        adversarial = config.ae_adv_weight > 0 and step >= config.ae_adv_start * config.ae_steps
        numbers = {"l1": 0.0, "loss": 0.0}
        for part in draws.parts(config.micro_batches):
            x = picture_batch(pixels, config, step, part)
            noise = part.normal(x.shape[0], config.ae_latent_channels, x.shape[2] // ratio, x.shape[3] // ratio)
            y = reconstruct(x, noise)
            loss = reconstruction_loss(y, x).mean()
            total = loss - config.ae_adv_weight * disc(y).mean() if adversarial else loss
            (total / config.micro_batches).backward()
            numbers["l1"] += (y - x).abs().mean().item() / config.micro_batches
            numbers["loss"] += loss.item() / config.micro_batches
        numbers |= apply_gradients(opt, step, config.ae_steps, 1.0, config, numbers["loss"])
        if adversarial:
            disc_opt.zero_grad(set_to_none=True)  # the generator's pass left gradients here
            hinge = F.relu(1 - disc(x)).mean() + F.relu(1 + disc(y.detach())).mean()
            hinge.backward()
            skipped = apply_gradients(disc_opt, step, config.ae_steps, 1.0, config, hinge.item())["skipped"]
            numbers |= {"disc_loss": hinge.item(), "skipped": max(numbers["skipped"], skipped)}
        ema.update(vae, step)
        return numbers

    @torch.no_grad()
    def preview(step: int, folder: Path) -> dict[str, float]:
        scores, sheet = [], []
        for start in range(0, min(256, len(held_out.images)), 32):
            x = torch.from_numpy(np.array(held_out.images[start:start + 32])).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1
            with autocast(config):
                y = ema.module.decode(ema.module.encode(x, return_dict=False)[0], return_dict=False)[0].float()
            scores.append(psnr_db(y, x))
            sheet += [x[:4], y[:4]] if start < 128 else []
        contact_sheet(torch.cat(sheet), folder / "preview.png", columns=8)
        return {"psnr_db": float(torch.cat(scores).mean())}

    run("autoencoder", out, config, config.ae_steps, {"vae": vae, "ema": ema, "opt": opt, "disc": disc, "disc_opt": disc_opt},
        train_step, config.ae_batch, preview, pixels.hash)
    vae = ema.module
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, pixels, config))
    save_model(vae, out / "autoencoder" / "vae")


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderDC, pixels: Pixels, config: Config, count: int = 512) -> float:
    """1 / std of the latents of evenly spaced training pictures: makes latents of unit variance, as the diffusion expects."""
    rows = np.linspace(0, len(pixels.images) - 1, min(count, len(pixels.images))).astype(int)
    latents = []
    for block in np.array_split(rows, max(1, len(rows) // 32)):
        x = torch.from_numpy(pixels.images[block]).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(config):
            latents.append(vae.encode(x, return_dict=False)[0].float().cpu())
    return round(1 / float(torch.cat(latents).std()), 5)
