"""`python -m training STAGE --recipe NAME --out DIR [--set key=value]`: one stage, or all of them, resuming what is there."""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

from training.checkpoint import newest_step
from training.config import RECIPES, Config, load_config
from training.distributed import finish, is_main, start
from training.dry_run import Looked, print_config
from training.memory import is_out_of_memory

STAGES = {
    "autoencoder": ("training.autoencoder", "train_autoencoder"),
    "teacher": ("training.teacher", "train_teacher"),
    "controlnet": ("training.controlnet", "train_controlnet"),
    "jump": ("training.jump", "train_jump"),
    "student": ("training.student", "train_student"),
    "decoder": ("training.decoder", "train_decoder"),
    "export": ("training.export", "export_model"),
    "evaluate": ("training.evaluate", "evaluate_run"),
    "lora": ("training.lora", "train_lora"),
    "finetune": ("training.finetune", "train_finetune"),
    "swap": ("training.swap", "train_swap"),
}
CHAIN = ("autoencoder", "teacher", "controlnet", "jump", "student", "decoder", "export", "evaluate")  # what "all" runs, in this order
NOT_TRAINED = {"export": "puts the stages' results together in OUT/model", "evaluate": "measures OUT/model"}
# the samples a step of a stage that opens the data before it shares them out; swap may need no step at all
BATCHES = {"autoencoder": "ae_batch"} | {stage: f"{stage}_batch" for stage in ("teacher", "controlnet", "jump", "student", "lora", "finetune")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="Trains one stage of the chain, or all of them.")
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--recipe", default="emoji-128", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="run folder (default runs/RECIPE)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one field of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print settings, sizes, memory and the first batch; train and write nothing but caches")
    args = parser.parse_args()
    try:
        config = dataclasses.replace(load_config(args.recipe, args.set), dry_run=args.dry_run)
        start()
        if args.dry_run and is_main():
            print_config(config, args.recipe)
        for stage in CHAIN if args.stage == "all" else [args.stage]:
            run_stage(stage, config, args.out or Path("runs") / args.recipe, args.dry_run and args.stage == "all")
        finish()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: {error}" if isinstance(error, MemoryError) and "What would help" in str(error) else
                 f"error: out of memory before the first step, in building the networks or the caches ({str(error).splitlines()[0]}). "
                 "What would help (--set): fsdp=true on several GPUs, ema=0 (a quarter less), size_px half as large; or a smaller base")


def run_stage(stage: str, config: Config, out: Path, dry_all: bool) -> None:
    """One stage; in a dry run of all of them one that cannot be looked at yet is named and passed over."""
    module, function = STAGES[stage]
    if config.dry_run and stage in NOT_TRAINED:
        print(f"{stage}: trains nothing; {NOT_TRAINED[stage]}")
        return
    begun = newest_step(out / stage / "checkpoints") or stage == "jump" and not config.jump_paths
    try:
        if stage in BATCHES and not begun:
            from training.loop import local_batch
            local_batch(getattr(config, BATCHES[stage]), config)  # refuses what cannot be shared out before the data are read
        getattr(importlib.import_module(module), function)(config, out)
    except Looked:
        pass
    except ValueError as error:
        if not dry_all:
            raise
        print(f"{stage}: cannot be looked at yet: {error}")


if __name__ == "__main__":
    main()
