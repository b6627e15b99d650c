"""`python -m training STAGE --recipe NAME --out DIR [--set key=value]`: one stage, or all of them, resuming what is there."""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import importlib
import sys
from pathlib import Path

from training.config import RECIPES, load_config

STAGES = {
    "autoencoder": ("training.autoencoder", "train_autoencoder"),
    "teacher": ("training.teacher", "train_teacher"),
    "controlnet": ("training.controlnet", "train_controlnet"),
    "student": ("training.student", "train_student"),
    "decoder": ("training.decoder", "train_decoder"),
    "export": ("training.export", "export_model"),
    "lora": ("training.lora", "train_lora"),
    "finetune": ("training.finetune", "train_finetune"),
    "swap": ("training.swap", "train_swap"),
}
CHAIN = ("autoencoder", "teacher", "controlnet", "student", "decoder", "export")  # what "all" runs, in this order


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="Trains one stage of the chain, or all of them.")
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--recipe", default="emoji-128", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="run folder (default runs/RECIPE)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one field of the recipe")
    args = parser.parse_args()
    try:
        config = load_config(args.recipe, args.set)
        for stage in CHAIN if args.stage == "all" else [args.stage]:
            module, function = STAGES[stage]
            getattr(importlib.import_module(module), function)(config, args.out or Path("runs") / args.recipe)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
