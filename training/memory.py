"""How much memory a step needs, before it runs and when it did not fit.

    weights      bytes of all parameters (4 a number; the averaged copy and frozen networks too)
    gradients    4 bytes a trained number
    optimiser    AdamW 8 bytes a trained number, 8-bit AdamW 2, CAME 4
    activations  what the backward pass of one micro-batch keeps: counted, not guessed, by passing the shapes of the first batch
                 through the networks (fake tensors: nothing is computed). The losses' own few tensors, temporary buffers and
                 the JVP's second set of intermediates are not in it.
With FSDP2 the first three, and the averages, are shared by the processes.
"""

from __future__ import annotations

import inspect
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from training.config import Config
from training.distributed import device, local, world

GIB = 2 ** 30
OPTIMIZER_BYTES = {"AdamW8bit": 2, "Came": 4}  # any other: 8


def peak_gib() -> float:
    """Most memory this process has used: of its GPU, else of the machine."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def standing_gib(parts: dict, config: Config) -> dict[str, float]:
    """GiB a process holds between two steps, by kind."""
    seen: dict[int, nn.Parameter] = {id(p): p for part in parts.values() if isinstance(part, nn.Module) for p in part.parameters()}
    trained: dict[int, nn.Parameter] = {}
    states = 0
    for part in parts.values():
        if isinstance(part, torch.optim.Optimizer):
            for p in (p for group in part.param_groups for p in group["params"]):
                trained[id(p)] = p
                states += local(p).numel() * OPTIMIZER_BYTES.get(type(part).__name__, 8)
    size = lambda params: sum(local(p).numel() * p.element_size() for p in params)
    found = {"weights": size({**seen, **trained}.values()), "gradients": size(trained.values()), "optimiser": states}
    # a dry run does not shard; what it shows is what the run would hold
    share = world() if config.fsdp and config.dry_run else 1
    return {kind: count / share / GIB for kind, count in found.items()}


@dataclass
class Trial:
    """What one step would do: its outermost network calls, and what the hungriest of its backward passes keeps."""

    calls: list[str] = field(default_factory=list)
    networks: list[nn.Module] = field(default_factory=list)
    activations: int = 0  # bytes
    open: int = 0         # bytes since the last backward


def try_step(train_step: Callable, step: int, draws: object) -> Trial:
    """Runs `train_step` with every network call replaced by a pass of shapes, and without backward: nothing is computed, no weight and no
    optimiser changed. No gradients may be left from before."""
    trial = Trial()
    with _shapes_only(trial), torch.compiler.set_stance("force_eager"):
        train_step(step, draws)
    trial.activations = max(trial.activations, trial.open)
    return trial


@contextmanager
def _shapes_only(trial: Trial) -> Iterator[None]:
    """Within it, calling a network returns zeros of the right shapes and notes the call; `backward` only ends the count."""
    call, backward, inside = nn.Module.__call__, torch.Tensor.backward, []

    def noted_call(module: nn.Module, *args, **kwargs):
        if inside:
            return call(module, *args, **kwargs)
        inside.append(module)
        try:
            kept, result = _pass_shapes(module, args, kwargs)
        finally:
            inside.pop()
        trial.open += kept
        trial.networks.append(module)
        trial.calls.append(_describe(module, args, kwargs))
        return result

    def end_count(tensor: torch.Tensor, *args, **kwargs) -> None:
        trial.activations, trial.open = max(trial.activations, trial.open), 0

    nn.Module.__call__, torch.Tensor.backward = noted_call, end_count
    try:
        yield
    finally:
        nn.Module.__call__, torch.Tensor.backward = call, backward


def _pass_shapes(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, object]:
    """(bytes that a backward pass through `module` would keep, zeros in the shapes of its result)."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage._cdata] = storage
        return x

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = lambda a: torch.empty(a.shape, dtype=a.dtype, device=a.device, requires_grad=a.requires_grad) if torch.is_tensor(a) else a
        weights = {name: mode.from_tensor(w) for name, w in [*module.named_parameters(), *module.named_buffers()]}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            result = torch.func.functional_call(module, weights, tree_map(fake, args), tree_map(fake, kwargs))
        for w in weights.values():
            storages.pop(w.untyped_storage()._cdata, None)
    zeros = lambda a: torch.zeros(a.shape, dtype=a.dtype, device=a.device, requires_grad=a.requires_grad) if torch.is_tensor(a) else a
    return sum(s.nbytes() for s in storages.values()), tree_map(zeros, result)


def _describe(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """'SanaTransformer2DModel(hidden_states [8, 32, 4, 4] float32, ...)'."""
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    tensors = [f"{name} {list(a.shape)} {str(a.dtype).removeprefix('torch.')}" for name, a in
               [(f"{n}[{i}]" if isinstance(v, (tuple, list)) else n, a) for n, v in given.items()
                for i, a in enumerate(v if isinstance(v, (tuple, list)) else [v])] if torch.is_tensor(a)]
    return f"{type(module).__name__}({', '.join(tensors)})"


def checkpointed_gib(trial: Trial, train_step: Callable, step: int, draws: object) -> float | None:
    """Activations with gradient checkpointing in every network of the trial that has it, or None if none has."""
    able = [n for n in {id(m): m for network in trial.networks for m in network.modules()}.values()
            if getattr(n, "_supports_gradient_checkpointing", False) and not n.is_gradient_checkpointing]
    if not able:
        return None
    for network in able:
        network.enable_gradient_checkpointing()
    try:
        return try_step(train_step, step, draws).activations / GIB
    finally:
        for network in able:
            network.disable_gradient_checkpointing()


def more_micro_batches(batch: int, config: Config) -> int | None:
    """The next number of micro-batches that shares `batch` out evenly, or None when a micro-batch is one sample already."""
    return next((m for m in range(config.micro_batches + 1, batch // world() + 1) if batch % (world() * m) == 0), None)


def out_of_memory_message(name: str, config: Config, batch: int, parts: dict, train_step: Callable, step: int, draws: object) -> str:
    """What held the memory, and the three settings that would help most, with numbers."""
    held = standing_gib(parts, config)
    for opt in (part for part in parts.values() if isinstance(part, torch.optim.Optimizer)):
        opt.zero_grad(set_to_none=True)  # those of the micro-batches before: the trial must not step with them, and they hold memory
    text = f"{name}: out of memory at step {step}. Held by a process: " + ", ".join(f"{k} {v:.2f} GiB" for k, v in held.items())
    activations = checkpointed = None
    try:
        if world() == 1:
            trial = try_step(train_step, step, draws)
            activations, checkpointed = trial.activations / GIB, checkpointed_gib(trial, train_step, step, draws)
            text += f", activations of one micro-batch about {activations:.2f} GiB"
        else:  # a trial would ask the other processes, which are in the step itself: all would wait for ever, or mix its numbers into theirs
            text += " (activations unknown: not tried with several processes)"
    except Exception as error:  # the message must come out, whatever the trial stumbles over
        text += f" (activations unknown: {type(error).__name__})"
    about = lambda factor: "" if activations is None else f": activations about {factor * activations:.2f} GiB"
    helps: list[str] = []
    more = more_micro_batches(batch, config)
    if more:
        helps.append(f"micro_batches={more} instead of {config.micro_batches}{about(config.micro_batches / more)}, same result")
    if checkpointed is not None:
        helps.append(f"checkpointing=true: activations about {checkpointed:.2f} GiB, a third slower")
    if config.optimizer == "adamw":
        lighter, share = ("came", 2) if config.fsdp else ("adamw8bit", 4)  # bitsandbytes does not know shards
        helps.append(f"optimizer={lighter}: optimiser {held['optimiser'] / share:.2f} instead of {held['optimiser']:.2f} GiB")
    if world() > 1 and not config.fsdp and name not in ("student", "jump"):
        helps.append(f"fsdp=true: weights, gradients and optimiser {sum(held.values()) / world():.2f} instead of {sum(held.values()):.2f} GiB a process")
    if config.precision == "fp32":
        helps.append(f"precision=bf16{about(1 / 2)}")
    helps.append(f"size_px={config.size_px // 2} instead of {config.size_px}{about(1 / 4)}")
    helps.append("a smaller batch of the stage, with a lower learning rate")
    return "\n".join([text + ".", "What would help (--set):", *(f"  {h}" for h in helps[:3])])
