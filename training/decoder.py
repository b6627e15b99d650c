"""Stage 6: the decoder alone, once more, on the frozen encoder's cached latents.

The latents stay what the denoiser was trained on, so this can run at any time after the autoencoder, and it is cheap: no
encoder in the step. An added squared error buys PSNR, a little latent noise keeps the decoder forgiving.
"""

from __future__ import annotations

from pathlib import Path

import torch

from training.autoencoder import psnr_db, reconstruction_loss
from training.batches import Corpus
from training.config import Config
from training.distributed import refuse_fsdp, save_model
from training.loop import Draws, autocast, local_batch, maybe_compile, run
from training.optim import Ema, apply_gradients, make_optimizer
from training.sheets import contact_sheet


def train_decoder(config: Config, out: Path) -> None:
    """Trains, and writes OUT/decoder/vae: the same encoder, the better decoder (averaged weights)."""
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    refuse_fsdp(config, "the decoder is small")
    vae, factor = corpus.vae, corpus.vae.config.scaling_factor
    vae.encoder.requires_grad_(False)
    ema = Ema(vae.decoder, config.ema)
    opt = make_optimizer([(list(vae.decoder.parameters()), config.decoder_lr)], config)

    def loss_of(latent: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with autocast(config):
            y = vae.decoder(latent / factor).float()
        return (reconstruction_loss(y, target) + 4 * (y - target).square().mean(dim=(1, 2, 3))).mean()

    loss_of = maybe_compile(config.compile, loss_of)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        total = 0.0
        for part in draws.parts(config.micro_batches):
            batch = corpus.draw(local_batch(config.ae_batch, config), part)
            latent = batch.x0 + config.ae_latent_noise * part.normal(*batch.x0.shape)
            loss = loss_of(latent, corpus.pictures(batch)) / config.micro_batches
            loss.backward()
            total += loss.item()
        numbers = apply_gradients(opt, step, config.decoder_steps, 1.0, config, total)
        ema.update(vae.decoder, step)
        return {"loss": total, **numbers}

    @torch.no_grad()
    def preview(step: int, folder: Path) -> dict[str, float]:
        batch = held_out.fixed(128)
        target = held_out.pictures(batch)
        with autocast(config):
            y = torch.cat([ema.module(x / factor).float() for x in batch.x0.split(32)])
        contact_sheet(torch.cat([target[:16], y[:16]]), folder / "preview.png", 16)
        return {"psnr_db": float(psnr_db(y, target).mean())}

    run("decoder", out, config, config.decoder_steps, {"decoder": vae.decoder, "ema": ema, "opt": opt}, train_step, config.ae_batch, preview, corpus.pixels.hash)
    vae.decoder.load_state_dict(ema.module.state_dict())
    save_model(vae, out / "decoder" / "vae")
