"""Several processes, one training: start, who am I, averages over the processes, FSDP2, and whole weights out of shards.

    accelerate launch --num_processes 8 -m training teacher --recipe ... --out ...

Every process runs the whole stage on its share of each batch. There is no wrapper around the networks: gradients are averaged
once an optimiser step (optim.py), which gives the numbers of one process, leaves the JVP its bare module and every stage its
code. FSDP2 (`fully_shard`) shards a network in place; its class and config stay.
OUT must lie on a file system that every process sees.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# one process may fill a cache for hours while the others wait at a barrier
TIMEOUT = timedelta(hours=12)
BUCKET_NUMBERS = 2 ** 25  # numbers a flat bucket holds: 128 MiB of float32


def device() -> torch.device:
    """This process's device: its own GPU (`start` chooses it), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start() -> None:
    """Joins the other processes when a launcher (accelerate launch, torchrun) started several; else does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState
        PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)  # sets this process's GPU as the current one


def finish() -> None:
    """Leaves the other processes in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and shows bars."""
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block alone (it fills the cache), then the others (they find it filled)."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def agreed(flag: bool) -> bool:
    """Whether `flag` is true on any process: the same answer everywhere. Every process must ask."""
    if world() == 1:
        return flag
    found = torch.tensor([float(flag)], device=device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def mean_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Each number's mean over the processes. Every process must pass the same names."""
    if world() == 1:
        return numbers
    found = torch.tensor([float(v) for v in numbers.values()], dtype=torch.float64, device=device())
    dist.all_reduce(found)
    return dict(zip(numbers, (found / world()).tolist()))


def std(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the elements of all processes' `x` (equal shapes), without gradient."""
    x = x.detach()
    if world() == 1:
        return x.std()
    sums = torch.stack([x.sum(), x.square().sum()])
    dist.all_reduce(sums)
    count = x.numel() * world()
    return ((sums[1] - sums[0] ** 2 / count) / (count - 1)).sqrt()


def average_gradients(params: list[torch.nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the processes, in a few flat buckets. FSDP2's are averaged already.

    A parameter that has a gradient on some processes only counts as zero on the others; one that has none stays without.
    """
    params = [p for p in params if not isinstance(p, DTensor)]
    if world() == 1 or not params:
        return
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=device())
    dist.all_reduce(used, dist.ReduceOp.MAX)
    bucket: list[torch.Tensor] = []
    for p, is_used in zip(params, used.tolist()):
        if not is_used:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if bucket and (bucket[0].dtype != p.grad.dtype or sum(g.numel() for g in bucket) + p.grad.numel() > BUCKET_NUMBERS):
            _average_bucket(bucket)
            bucket = []
        bucket.append(p.grad)
    if bucket:
        _average_bucket(bucket)


def _average_bucket(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)])


def copy_from_main(module: torch.nn.Module) -> None:
    """Gives every process the main process's weights and buffers. Shards are left alone: they came from equal weights."""
    for tensor in [*module.parameters(), *module.buffers()] if world() > 1 else ():
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), 0)


# --- FSDP2 ---

def shard_model(module: torch.nn.Module, config) -> torch.nn.Module:
    """Shards `module` in place over the processes where `config.fsdp` asks for it: every transformer block, then the rest.

    `module` is a transformer, a ControlNet, or a pair of them. Call it after `Ema(module, ...)` (a sharded network cannot be
    copied) and before the optimiser; shard `ema.module` too. Returns `module`. With one process, or in a dry run, nothing happens.
    """
    if not config.fsdp or world() == 1 or config.dry_run:
        return module
    copy_from_main(module)
    mesh = init_device_mesh(device().type, (world(),))
    for network in [m for m in module.modules() if hasattr(m, "transformer_blocks")] or [module]:
        # resharded after each forward, the root too: what reads parameters between two forwards sees shards only
        for block in getattr(network, "transformer_blocks", ()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return module


def refuse_fsdp(config, why: str) -> None:
    """ValueError for a stage that cannot be sharded."""
    if config.fsdp:
        raise ValueError(f"fsdp=true: {why}. Data parallel works: the same `accelerate launch` with fsdp=false")


def is_sharded(part: object) -> bool:
    """Whether any parameter of a module, or of an optimiser, lies in shards."""
    if isinstance(part, torch.nn.Module):
        return any(isinstance(p, DTensor) for p in part.parameters())
    return any(isinstance(p, DTensor) for group in getattr(part, "param_groups", ()) for p in group["params"])


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: object) -> object:
    """A state dict with every sharded tensor gathered (on the CPU, in the main process only; None elsewhere)."""
    if isinstance(state, DTensor):
        full = state.full_tensor()  # all processes take part
        return full.cpu() if is_main() else None
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(v) for v in state)
    return state


def shard_rows(rows: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """This process's `rows` of a matrix with as many rows as `pattern` has, sharded as `pattern` is."""
    if not isinstance(pattern, DTensor):
        return rows
    shape = (pattern.shape[0], rows.shape[1])
    return DTensor.from_local(rows, pattern.device_mesh, pattern.placements, run_check=False, shape=shape, stride=(rows.shape[1], 1))


def like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every process, sharded by its first axis as `pattern` is, if it has as many rows. Nothing is sent."""
    if not isinstance(pattern, DTensor) or tensor.ndim == 0 or tensor.shape[0] != pattern.shape[0]:
        return tensor
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def load_whole(part: object, state: dict) -> None:
    """`part.load_state_dict(state)`, for a module or an optimiser in shards too.

    An optimiser keeps the peak learning rates it was made with: a run may go on with a lower one. ValueError when the state is
    that of another kind of optimiser.
    """
    if isinstance(part, torch.nn.Module) and is_sharded(part):
        patterns = part.state_dict()
        state = {name: like(tensor, patterns[name]) if name in patterns else tensor for name, tensor in state.items()}
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    missing = set(part.param_groups[0]) - set(state["param_groups"][0])
    if missing:
        raise ValueError(f"the optimiser was another one than {type(part).__name__}: it had no {', '.join(sorted(missing))}")
    if is_sharded(part):
        params = [p for group in part.param_groups for p in group["params"]]
        shard = lambda p, v: like(v, p) if torch.is_tensor(v) else v
        state = {**state, "state": {i: {k: shard(params[i], v) for k, v in s.items()} for i, s in state["state"].items()}}
    peaks = [group["peak"] for group in part.param_groups]
    part.load_state_dict(state)
    for group, peak in zip(part.param_groups, peaks):
        group["peak"] = peak


def save_model(module: torch.nn.Module, folder: Path) -> None:
    """`module.save_pretrained(folder)` from the main process; a sharded network is gathered first. Every process must call it."""
    if is_sharded(module):
        state = whole(module.state_dict())
        if is_main():
            plain = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
            with torch.device("meta"):
                gathered = plain.from_config(module.config)
            gathered.load_state_dict(state, assign=True)
            gathered.save_pretrained(folder)
    elif is_main():
        module.save_pretrained(folder)
    barrier()
