"""`--dry-run`: what a stage would do, without doing it: settings, sizes, memory, the first batch. Comes with `run` for every stage.

Written are the caches of the data only. Nothing is computed in the networks, so that the largest ones can be looked at on any
machine whose memory holds their weights.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from training.checkpoint import newest_step
from training.config import Config
from training.distributed import device, is_main, world
from training.memory import GIB, checkpointed_gib, peak_gib, standing_gib, try_step


class Looked(Exception):
    """Ends a stage that was only to be looked at."""


def print_config(config: Config, recipe: str) -> None:
    """Every field, one a line; `*` before those that differ from the default."""
    print(f"recipe {recipe}; * = not the default")
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name != "dry_run":
            print(f"{' ' if value == f.default else '*'} {f.name} = {value!r}" + ("" if value == f.default else f"   (default {f.default!r})"))


def count_numbers(module: torch.nn.Module, trained: set[int]) -> tuple[int, int]:
    """(trained, frozen) numbers of a module's parameters. `trained`: ids of the parameters that an optimiser holds."""
    counts = [0, 0]
    for p in module.parameters():
        counts[id(p) not in trained] += p.numel()
    return counts[0], counts[1]


def living_parameters() -> dict[int, torch.nn.Parameter]:
    """All parameters that lie in the memory of this process's device: what a stage holds beside its step (the autoencoder, for the
    previews) no list names."""
    gc.collect()
    # by type(): isinstance() would wake the lazy objects that some libraries leave about
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Parameter)]
    return {id(p): p for p in found if p.device.type == device().type}


def look(name: str, out: Path, config: Config, steps: int, parts: dict, train_step: Callable, draws: object, batch: int) -> None:
    """Prints what stage `name` would do, then raises `Looked`. `draws`: those of the first step, `batch`: samples a step."""
    lines = [f"{name}: step {newest_step(out / name / 'checkpoints')} to {steps}, {batch} samples a step = {world()} process(es) × {config.micro_batches} "
             f"micro-batch(es) × {batch / world() / config.micro_batches:g}"]
    optimisers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    trained = {id(p) for opt in optimisers for group in opt.param_groups for p in group["params"]}
    lines += ["", f"{'part':24}{'trained':>16}{'frozen':>16}"]
    for part_name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            lines += [f"{n:24}{a:16,}{b:16,}" for n, (a, b) in [(part_name, count_numbers(part, trained))]
                      + [(f"  .{child}", count_numbers(m, trained)) for child, m in part.named_children() if sum(count_numbers(m, trained))]]
    for opt in optimisers:
        lines += [f"{type(opt).__name__}: " + ", ".join(f"{sum(p.numel() for p in g['params']):,} numbers at {g.get('peak', g['lr']):g}" for g in opt.param_groups)]
    living, until_now = living_parameters(), peak_gib()
    trial = try_step(train_step, 0, draws)
    held = standing_gib(parts, config)
    known = {id(p) for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters()}
    others = {id(p): p.numel() * p.element_size() for network in trial.networks for p in network.parameters() if id(p) not in known}
    held["other networks called"] = sum(others.values()) / GIB
    idle = [p for p in living.values() if id(p) not in known | others.keys()]
    held["networks not called"] = sum(p.numel() * p.element_size() for p in idle) / GIB
    held["activations"] = trial.activations / GIB
    lines += ["", f"memory of a process, GiB{' (shared by FSDP2)' if config.fsdp and world() > 1 else ''}"]
    lines += [f"  {kind:24}{size:10.3f}" for kind, size in held.items()]
    lines += [f"  {'together, roughly':24}{sum(held.values()):10.3f}"]
    lines += [f"  {'most until now':24}{until_now:10.3f}   measured: the whole program, text encoder and encoding of the data included"]
    checkpointed = checkpointed_gib(trial, train_step, 0, draws)
    if checkpointed is not None:
        lines += [f"  with checkpointing=true the activations would be {checkpointed:.3f}"]
    distinct = list(dict.fromkeys(trial.calls))
    lines += ["", "network calls of the first step on its first batch"] + [f"  {call}" + (f"   × {trial.calls.count(call)}" if trial.calls.count(call) > 1 else "") for call in distinct]
    if is_main():
        print("\n".join(lines), flush=True)
    raise Looked(name)
