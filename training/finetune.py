"""Full-rank fine-tuning of base SANA or of a teacher, as it is: the flow loss, all weights, and a folder that stock diffusers loads.

    python -m training finetune --recipe sana-1.6b-512 --out runs/512 --set base=FOLDER --set data=PICTURES
    python -m training finetune --recipe sana-1.6b-1024 --out runs/1024 --set base=runs/512/finetune --set data=PICTURES

The same stage raises the resolution step by step. Published SANA has no positional embedding up to 1024 px, so nothing in the weights
changes with the size; the 2048 px recipe turns sine-cosine positions on, as NVlabs did (base.set_latent_size).
"""

from __future__ import annotations

from pathlib import Path

import torch

from training.base import check_fits, load_transformer, refuse_sprint, report_changes, save_folder, set_latent_size, with_base
from training.batches import Corpus
from training.config import Config
from training.loop import device
from training.teacher import latent_shape, train_flow


def train_finetune(config: Config, out: Path) -> None:
    """Trains, and writes OUT/finetune: the transformer with the averaged weights beside the base's other parts."""
    config = with_base(config, out, "teacher")
    if not config.base:
        raise ValueError("the finetune stage needs base: a model folder in the diffusers layout, or an NVlabs .pth")
    corpus, held_out = Corpus(config, out, "train"), Corpus(config, out, "val")
    channels, sample_size, text_channels = latent_shape(config, corpus)
    torch.manual_seed(config.seed)
    model = load_transformer(config.base)
    refuse_sprint(model, "finetune")
    check_fits(model, channels, text_channels)
    report_changes({"added": [], "config": set_latent_size(model, sample_size, config.interpolation_scale)}, config.base, out / "finetune", config.dry_run)
    average = train_flow("finetune", model.to(device()), config, out, corpus, held_out, config.finetune_steps, config.finetune_batch, config.finetune_lr)
    save_folder(out / "finetune", {"transformer": average}, config.base)
