"""Optimisers, layer-wise learning rates, averaged weights, and the one place where gradients become a step."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from training.config import OPTIMIZERS, Config
from training.distributed import agreed, average_gradients, is_sharded, local, shard_rows


def learning_rate(peak: float, step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then a cosine from `peak` down to `lr_final * peak` at the last step."""
    warm = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    done = min(1.0, step / max(1, steps))
    return peak * warm * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))


def layer_groups(module: nn.Module, lr: float, config: Config) -> list[tuple[list[nn.Parameter], float]]:
    """(parameters, peak learning rate) groups of the trainable weights: norms, cross attention (attn2) and the rest, each `lr`
    times its multiplier of the config. One group, in the module's order, when the multipliers are equal."""
    multipliers = {"norms": config.lr_norms, "cross_attention": config.lr_cross_attention, "rest": config.lr_rest}
    if len(set(multipliers.values())) == 1:
        return [([p for p in module.parameters() if p.requires_grad], lr * config.lr_rest)]
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in multipliers}
    for name, p in module.named_parameters():
        kind = "norms" if "norm" in name else "cross_attention" if ".attn2." in f".{name}" else "rest"
        if p.requires_grad:
            groups[kind].append(p)
    return [(params, lr * multipliers[kind]) for kind, params in groups.items() if params]


class Ema(torch.nn.Module):
    """Averaged copy of a module's weights. The decay is ramped up, so that the random start is soon forgotten.

    Make it before the module is sharded, then shard `ema.module` too.
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        super().__init__()
        assert not is_sharded(module), "make the Ema first: a sharded module cannot be copied"
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [local(p.detach()) for p in self.module.parameters()], [local(p.detach()) for p in module.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def adamw(groups: list[tuple[list, float]], config: Config) -> torch.optim.AdamW:
    """AdamW over (parameters, peak learning rate) groups. Fused on both devices: one pass over the weights."""
    return torch.optim.AdamW(_named(groups), betas=(0.9, 0.99), weight_decay=1e-3, fused=True)


def make_optimizer(groups: list[tuple[list, float]], config: Config) -> torch.optim.Optimizer:
    """`config.optimizer` over (parameters, peak learning rate) groups. ValueError says what is missing or does not go together."""
    if config.optimizer == "adamw":
        return adamw(groups, config)
    if config.optimizer == "came":
        return Came(_named(groups), weight_decay=1e-3)
    if config.optimizer == "adamw8bit":
        if any(isinstance(p, DTensor) for params, _ in groups for p in params):
            raise ValueError("optimizer=adamw8bit with fsdp=true: bitsandbytes does not know shards; take optimizer=came, or adamw")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(f"optimizer=adamw8bit needs bitsandbytes 0.50 or later ({error}): "
                             "pip install --no-deps 'bitsandbytes>=0.50', or take optimizer=came") from error
        return AdamW8bit(_named(groups), betas=(0.9, 0.99), weight_decay=1e-3)
    raise ValueError(f"optimizer={config.optimizer!r}: known are {', '.join(OPTIMIZERS)}")


def _named(groups: list[tuple[list, float]]) -> list[dict]:
    return [{"params": params, "lr": lr, "peak": lr} for params, lr in groups]


class Came(torch.optim.Optimizer):
    """CAME (arXiv 2307.02047, algorithm 2): Adam whose second moment is kept as row and column means, with a confidence that
    shrinks the parts of the step that keep changing. Half of AdamW's memory.

    A convolution's weight counts as the matrix [out, in·kh·kw]: the authors' code factors the last two axes, which for the 1×1
    convolutions of SANA's feed-forward are 1×1, and would take more memory than Adam. Works on FSDP2's shards.
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), eps: tuple[float, float] = (1e-30, 1e-16),
                 clip_threshold: float = 1.0, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, clip_threshold=clip_threshold, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: nn.Parameter, group: dict) -> None:
        (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        factored = p.ndim >= 2 and p.shape[0] > 1 and p.numel() > p.shape[0]
        dtype = torch.promote_types(p.dtype, torch.float32)
        state, weight, g = self.state[p], local(p), local(p.grad).to(dtype)
        if not state:
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            for name in ("sq", "res") if factored else ():
                state[f"{name}_row"] = shard_rows(g.new_zeros(len(g), 1), p)
                state[f"{name}_col"] = g.new_zeros(1, p.numel() // p.shape[0])
            if not factored:
                state["sq"] = torch.zeros_like(p, dtype=dtype)
        total = (lambda x: _sum_over_shards(x, p))
        rms = lambda x: (total(x.square().sum()) / p.numel()).sqrt()

        def inverse_root(square: torch.Tensor, name: str, beta: float) -> torch.Tensor:
            """Update the running row and column means by `square` [n, m]; -> 1/sqrt of their rank-one product [n, m]."""
            row, col = local(state[f"{name}_row"]), state[f"{name}_col"]
            row.lerp_(square.mean(1, keepdim=True), 1 - beta)
            col.lerp_(total(square.sum(0, keepdim=True)) / p.shape[0], 1 - beta)
            return (row / (total(row.sum()) / p.shape[0])).rsqrt() * col.rsqrt()

        if factored:
            g = g.flatten(1)
            update = inverse_root(g.square() + eps1, "sq", beta2) * g
        else:
            square = local(state["sq"])
            square.lerp_(g.square() + eps1, 1 - beta2)
            update = square.rsqrt() * g
        update /= (rms(update) / group["clip_threshold"]).clamp(min=1.0)
        average = local(state["exp_avg"]).view_as(update)
        average.lerp_(update, 1 - beta1)
        if factored:
            update = inverse_root((update - average).square() + eps2, "res", beta3) * average
        else:
            update = average
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update.view_as(weight))


def _sum_over_shards(x: torch.Tensor, p: nn.Parameter) -> torch.Tensor:
    """`x` summed over the processes that hold shards of `p`; `x` itself for a whole `p`."""
    if isinstance(p, DTensor):
        dist.all_reduce(x, group=p.device_mesh.get_group())
    return x


def clip_gradients(params: list[nn.Parameter], clip: float) -> torch.Tensor:
    """Scales all gradients down to the norm `clip`; -> their norm before. Whole and sharded ones may be mixed."""
    whole = [p for p in params if not isinstance(p.grad, DTensor)]
    shards = [p for p in params if isinstance(p.grad, DTensor)]
    norm = nn.utils.get_total_norm([p.grad for p in whole])
    if shards:
        sharded = nn.utils.get_total_norm([p.grad for p in shards])
        norm = torch.hypot(norm.to(sharded.device), sharded.full_tensor() if isinstance(sharded, DTensor) else sharded)
        torch._foreach_mul_([local(p.grad) for p in shards], (clip / (norm + 1e-6)).clamp(max=1.0))
    nn.utils.clip_grads_with_norm_(whole, clip, norm)
    return norm


def apply_gradients(opt: torch.optim.Optimizer, step: int, steps: int, clip: float, config: Config, loss: float = 0.0) -> dict[str, float]:
    """Average over the processes, clip, set the learning rate, step, clear.

    A gradient or a `loss` that is not finite, on any process, skips the step on all of them and is counted. Where there is no gradient
    at all (a trial of shapes, memory.py) nothing is stepped, and no state made.
    """
    average_gradients([p for group in opt.param_groups for p in group["params"]])
    params = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
    norm = clip_gradients(params, clip)
    skipped = agreed(not (math.isfinite(norm) and math.isfinite(loss)))
    if params and not skipped:
        for group in opt.param_groups:
            group["lr"] = learning_rate(group["peak"], step, steps, config)
        opt.step()
    opt.zero_grad(set_to_none=True)
    return {"grad_norm": float(norm), "skipped": float(skipped)}
