"""A stage that costs next to nothing, through the real loop: for many runs, several processes and many kills.

    python tests/toy_stage.py OUT[,key=value,...] ... [--steps 5] [--model sana|line]     (RANK, WORLD_SIZE, ... as a launcher sets them)
    python tests/toy_stage.py --serve ...      the same, one run for each line of the standard input, in a process forked from this one

Beside the settings of a recipe: steps=N, poisoned=1 and hungry=1 (train_toy), halt=N and halt_writing=N: in step N, or half way through writing the checkpoint
of N steps, the run makes a file OUT/halted and stands still until that is gone; a test need not guess how fast this machine is.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sana_app  # noqa: F401

import torch
from diffusers import SanaTransformer2DModel

from sana_app.model.attention import use_explicit_softmax
from sana_app.model.network import predict_flow
from training import checkpoint, distributed
from training.config import Config, load_config
from training.flow import flow_loss, flow_path
from training.loop import Draws, local_batch, run
from training.optim import Ema, apply_gradients, layer_groups, make_optimizer

BATCH = 8
SETTINGS = ["precision=fp32", "preview_steps=0", "save_minutes=0", "ema=0.9", "lr_warmup_steps=1", "tracker=none"]


def tiny_sana() -> SanaTransformer2DModel:
    """In float64: Adam divides by the gradient's size, and where the true gradient is 0 (a key's bias) float32 noise becomes a step."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(in_channels=4, out_channels=4, sample_size=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, patch_size=1,
                                   num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=12,
                                   qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    use_explicit_softmax(model)
    return model.double()


def halt(out: Path) -> None:
    (out / "halted").touch()
    while (out / "halted").exists():
        time.sleep(0.001)


def halt_writing(out: Path, step: int) -> None:
    """From now on the checkpoint of `step` steps is written half, then the run halts."""
    whole = checkpoint.write_atomic

    def half(path: Path, write) -> None:
        def write_half(file) -> None:
            content = io.BytesIO()
            write(content)
            file.write(content.getvalue()[:content.tell() // 2])
            file.flush()
            halt(out)
        whole(path, write_half if path.name == f"step-{step:07d}.pt" else write)
    checkpoint.write_atomic = half


def train_toy(config: Config, out: Path, steps: int, kind: str = "sana", poisoned: bool = False, halt_at: int = -1, hungry: bool = False) -> torch.nn.Module:
    """`poisoned`: in step 1 the last process finds a gradient that is not a number; `hungry`: it runs out of memory, its gradients half made."""
    torch.manual_seed(0)
    model = tiny_sana() if kind == "sana" else torch.nn.Linear(500, 500)
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    ema = Ema(model, config.ema)
    distributed.shard_model(model, config)
    distributed.shard_model(ema.module, config)
    opt = make_optimizer(layer_groups(model, 1e-3, config), config)
    count = local_batch(BATCH, config)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        if step == halt_at:
            halt(out)
        total = 0.0
        for part in draws.parts(config.micro_batches):
            if kind == "sana":
                x0, z = part.normal(count, 4, 4, 4).double(), part.normal(count, 4, 4, 4).double()
                s, text = part.uniform(count).double(), part.normal(count, 3, 12).double()
                loss = flow_loss(predict_flow(model, flow_path(x0, z, s), s, text), x0, z).mean() / config.micro_batches
            else:
                x = part.normal(count, 500)
                loss = (model(x) - x.flip(1)).square().mean() / config.micro_batches
            loss.backward()
            total += loss.item()
        chosen = step == 1 and distributed.rank() == distributed.world() - 1
        if hungry and chosen:
            raise torch.OutOfMemoryError("no more memory on this process")
        if poisoned and chosen:
            next(model.parameters()).grad.fill_(math.nan)
        numbers = apply_gradients(opt, step, steps, 1.0, config, total)
        ema.update(model, step)
        return {"loss": total, **numbers}

    run("toy", out, config, steps, {"model": model, "ema": ema, "opt": opt}, train_step, BATCH)
    return ema.module


def work(job: str, steps: int, kind: str) -> None:
    """One run. `job`: OUT[,key=value,...]"""
    out, *sets = job.split(",")
    own = {name: int(value) for name, value in (s.split("=") for s in sets) if name in ("poisoned", "hungry", "halt", "halt_writing", "steps")}
    config = load_config("tiny-cpu", [*SETTINGS, *(s for s in sets if s.split("=")[0] not in own)])
    if "halt_writing" in own:
        halt_writing(Path(out), own["halt_writing"])
    averaged = train_toy(config, Path(out), own.get("steps", steps), kind, "poisoned" in own, own.get("halt", -1), "hungry" in own)
    if kind == "sana":
        distributed.save_model(averaged, Path(out) / "model")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", default="sana")
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.serve:
        distributed.start()
        for job in args.jobs:
            work(job, args.steps, args.model)
        distributed.finish()
        return
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # standard output is for the two lines below
            try:
                work(line.strip(), args.steps, args.model)
                os._exit(0)
            except SystemExit:
                os._exit(1)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(2)
        print("pid", child, flush=True)
        print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
