"""Benchmark: our distillation step against the public script's way of doing the same sums, on one small model on the CPU.

    python -m training.bench_scm

Same weights, same inputs, same formulas; loss and every gradient are compared before anything is timed. The public way
(the Sprint trainer of diffusers' research examples, written anew): the attention bias laid out for every query, the time
embedding computed a second time in every forward for the log variance, the log variance carried through torch.func.jvp, the
loss and the numbers for the log over whole latents, and one backward pass at the end through the graphs of both losses. Ours:
losses.py and student.py as they train: the JVP by dual numbers, and each loss with a backward pass of its own. Every
measurement runs in fresh processes, in turns.
"""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention

from sana_app.model import trigflow
from sana_app.model.attention import use_explicit_softmax
from sana_app.model.convert import sprint_from_teacher
from sana_app.model.network import TrigFlowTeacher
from training.batches import Batch
from training.config import Config
from training.discriminator import Discriminator
from training.loop import Draws, autocast
from training.losses import hinge_generator, tangent_directions
from training.student import SIGMA_DATA, Distillation, Logvar, adversarial_times

ROOT = Path(__file__).parent.parent
WAYS = ("public", "ours")
PARTS = {"scm": "sCM loss and gradient", "step": "whole student step (sCM + LADD)"}
SHAPE = dict(heads=8, layers=8, batch=8, side=8, tokens=16)  # width = 32 * heads; side of the latent; text tokens


@dataclass
class Case:
    """One step's draws. Times [B], latents of std sigma_data [B, C, h, w], `scale` [B] (no ControlNet here: unused)."""

    batch: Batch
    x_t: torch.Tensor
    t: torch.Tensor
    w: torch.Tensor
    x_adv: torch.Tensor
    t_adv: torch.Tensor
    z_disc: torch.Tensor
    t_disc: torch.Tensor
    scale: torch.Tensor


def build(heads: int, layers: int, batch: int, side: int, tokens: int, precision: str = "fp32") -> tuple[Distillation, Case]:
    """Teacher, student, discriminator with random weights, and the draws of one step; the same numbers at every call."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=32, out_channels=32, sample_size=side, patch_size=1, num_attention_heads=heads, attention_head_dim=32, num_layers=layers,
        num_cross_attention_heads=heads, cross_attention_head_dim=32, cross_attention_dim=32 * heads, caption_channels=384,
        qk_norm="rms_norm_across_heads", timestep_scale=0.001, interpolation_scale=1.0)
    config = Config(precision=precision, disc_blocks=tuple(sorted({layers // 4, layers // 2, layers - 1})))
    teacher, student = TrigFlowTeacher(transformer).requires_grad_(False).eval(), TrigFlowTeacher(sprint_from_teacher(transformer))
    use_explicit_softmax(teacher)
    use_explicit_softmax(student)
    losses = Distillation(config, teacher, student, Discriminator(teacher, config.disc_blocks), Logvar(32 * heads, 32 * side * side))
    draws, shape = Draws(0, 0), (batch, 32, side, side)
    x0, z, z_disc = (draws.normal(*shape) * SIGMA_DATA for _ in range(3))
    lengths = 2 + (draws.uniform(batch) * (tokens - 2)).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    null = (torch.arange(tokens) < 2).long().expand(batch, -1)
    given = Batch(x0=x0 / SIGMA_DATA, cond=torch.zeros(shape), text=draws.normal(batch, tokens, 384), mask=mask, null_text=draws.normal(batch, tokens, 384),
                  null_mask=null, rows=None, captions=[""] * batch)
    t = trigflow.t_from_normal(draws.normal(batch), config.scm_mean, config.scm_std)
    t_adv, t_disc = adversarial_times(draws.normal(batch), draws.uniform(batch), t, config.ladd_t_max_share)
    w = torch.tensor(config.guidance)[torch.arange(batch) % len(config.guidance)]
    return losses, Case(given, trigflow.interpolate(x0, z, t), t, w, trigflow.interpolate(x0, z, t_adv), t_adv, z_disc, t_disc, torch.ones(batch))


# ---- our way ----------------------------------------------------------------------------------------------------


def our_step(losses: Distillation, case: Case, part: str) -> float:
    """Gradients of one student step as `Distillation.backward` makes them; returns the weighted loss."""
    loss = losses.config.scm_weight * losses.consistency(case.x_t, case.t, case.w, case.batch, case.scale, 1.0)
    loss.backward()
    total = loss.item()
    if part == "step":
        loss = losses.config.ladd_weight * losses.adversarial(case.x_adv, case.t_adv, case.z_disc, case.t_disc, case.w, case.batch, case.scale)
        loss.backward()
        total += loss.item()
    return total


# ---- the public way ---------------------------------------------------------------------------------------------


class SpreadBiasAttention:
    """Cross attention with the additive mask laid out as [B, heads, N, L] before the softmax, and a dropout of 0 after it."""

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)                           # [B, heads, N or L, d]
        query, key, value = heads(attn.norm_q(attn.to_q(hidden_states))), heads(attn.norm_k(attn.to_k(encoder_hidden_states))), heads(attn.to_v(encoder_hidden_states))
        bias = query.new_zeros(*query.shape[:3], key.shape[2])                                        # [B, heads, N, L]
        if attention_mask is not None:
            bias += attention_mask.unsqueeze(1)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        scores += bias
        scores = torch.dropout(torch.softmax(scores, dim=-1), 0.0, train=True)
        out = (scores @ value).transpose(1, 2).flatten(2)                                             # [B, N, C]
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def spread_bias(net: TrigFlowTeacher) -> None:
    for block in net.transformer.transformer_blocks:
        block.attn2.set_processor(SpreadBiasAttention())


def public_step(losses: Distillation, case: Case, part: str) -> float:
    """The same gradients in the public script's order and form; `losses` must have gone through `spread_bias`."""
    student, teacher, batch, t4 = losses.student, losses.teacher, case.batch, case.t.view(-1, 1, 1, 1)
    cos, sin = torch.cos(t4), torch.sin(t4)

    def forward(x, t):
        F = student(x, t.flatten(), batch.text, batch.mask, guidance=case.w)
        return F, losses.logvar(student.transformer, t.flatten(), case.w)

    with autocast(losses.config):
        with torch.no_grad():
            both = SIGMA_DATA * teacher(torch.cat([case.x_t, case.x_t]) / SIGMA_DATA, torch.cat([case.t, case.t]), torch.cat([batch.null_text, batch.text]),
                                        torch.cat([batch.null_mask, batch.mask]))
            without, given = both.chunk(2)
            dxdt = without + (1 + losses.config.guidance_gain * (case.w.view(-1, 1, 1, 1) - 1)) * (given - without)
            v_x, v_t = tangent_directions(dxdt, case.t)
            _, dF, _ = torch.func.jvp(forward, (case.x_t / SIGMA_DATA, t4), (v_x, v_t.view(-1, 1, 1, 1)), has_aux=True)
        F, logvar = forward(case.x_t / SIGMA_DATA, t4)
        logvar, constant = logvar.view(-1, 1, 1, 1), F.detach()
        g = -cos * cos * (SIGMA_DATA * constant - dxdt) - (cos * sin * case.x_t + SIGMA_DATA * dF)
        g = g / (torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) + 0.1)
        weight = 1 / (torch.tan(t4) * SIGMA_DATA)
        loss = ((weight / torch.exp(logvar)) * torch.square(F - constant - g) + logvar).mean() * losses.config.scm_weight
        for_the_log = (weight * torch.square(F - constant - g)).mean()
        x0 = cos * case.x_t - sin * F * SIGMA_DATA
        if part == "step":
            F = forward(case.x_adv / SIGMA_DATA, case.t_adv)[0]
            x0 = trigflow.clean_from_F(case.x_adv, F, case.t_adv)
            verdict = losses.judge(x0, case.z_disc, case.t_disc, batch, case.scale)
            loss = loss + losses.config.ladd_weight * hinge_generator(verdict).mean()
    loss.backward()
    del for_the_log
    return loss.item()


STEPS = {"ours": our_step, "public": public_step}


# ---- comparing and measuring ------------------------------------------------------------------------------------


def gradients(losses: Distillation) -> dict[str, torch.Tensor]:
    """Name -> gradient of the student and the log variance, and clears them."""
    named = [*losses.student.named_parameters(), *losses.logvar.named_parameters("logvar"), *losses.disc.named_parameters("disc")]
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    for _, p in named:
        p.grad = None
    return found


def compare(shape: dict, part: str) -> float:
    """Both ways in float32 on the same numbers: AssertionError unless loss and all gradients agree. Returns the loss."""
    losses, case = build(**shape)
    losses.disc.eval()  # no power iteration of the spectral norm between the two
    ours, of_ours = our_step(losses, case, part), gradients(losses)
    spread_bias(losses.student)
    spread_bias(losses.teacher)
    theirs, of_theirs = public_step(losses, case, part), gradients(losses)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
    assert of_ours.keys() == of_theirs.keys() and any(g.abs().max() > 0 for g in of_ours.values())
    largest = max(float(g.abs().max()) for g in of_ours.values())
    for name, gradient in of_ours.items():
        torch.testing.assert_close(gradient, of_theirs[name], rtol=1e-3, atol=1e-5 * largest, msg=lambda m: f"{part}, gradient of {name}: {m}")
    return ours


def peak_mib() -> float:
    """Highest resident memory of this process. Linux: VmHWM, since ru_maxrss starts at the parent's; else ru_maxrss."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # bytes on macOS


def reset_peak() -> float:
    """Lets the high-water mark start from what is resident now, where the system can (Linux); returns it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak_mib()


def measure(shape: dict, way: str, part: str, repeat: int, threads: int, precision: str) -> dict:
    """In this process: seconds of each step after one that does not count, and the highest resident memory in MiB."""
    torch.set_num_threads(threads)
    losses, case = build(**shape, precision=precision)
    if way == "public":
        spread_bias(losses.student)
        spread_bias(losses.teacher)
    before, wall, cpu = reset_peak(), [], []
    for _ in range(repeat + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        STEPS[way](losses, case, part)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        for module in (losses.student, losses.logvar, losses.disc):
            module.zero_grad(set_to_none=True)
    return {"wall_s": wall[1:], "cpu_s": cpu[1:], "peak_mib": peak_mib(), "added_mib": peak_mib() - before}


def measure_all(shape: dict, rounds: int, repeat: int, threads: int, precision: str) -> dict[str, dict[str, dict]]:
    """part -> way -> medians, each of `rounds` fresh processes, the ways in turns."""
    found: dict = {part: {way: {"wall_s": [], "cpu_s": [], "peak_mib": [], "added_mib": []} for way in WAYS} for part in PARTS}
    arguments = [f"--{key}={value}" for key, value in (*shape.items(), ("repeat", repeat), ("threads", threads), ("precision", precision))]
    for round_ in range(rounds):
        for part in PARTS:
            for way in WAYS if round_ % 2 == 0 else WAYS[::-1]:
                child = subprocess.run([sys.executable, "-m", "training.bench_scm", "--child", way, part, *arguments], capture_output=True, text=True, cwd=ROOT)
                if child.returncode:
                    raise RuntimeError(f"the {way} way failed: {child.stderr[-2000:]}")
                for key, value in json.loads(child.stdout.splitlines()[-1]).items():
                    found[part][way][key] += value if isinstance(value, list) else [value]
    return {part: {way: {key: statistics.median(v) for key, v in numbers.items()} for way, numbers in ways.items()} for part, ways in found.items()}


def table(found: dict[str, dict[str, dict]]) -> str:
    rows = [f"{'':34s}{'public way':>12s}{'ours':>12s}{'ours / public':>16s}"]
    names = {"wall_s": "elapsed, s (other load counts)", "cpu_s": "CPU time, s", "added_mib": "memory of the step, MiB", "peak_mib": "peak memory, MiB"}
    for part, ways in found.items():
        rows.append(PARTS[part])
        for key, name in names.items():
            theirs, ours = ways["public"][key], ways["ours"][key]
            digits = 3 if key.endswith("_s") else 0
            rows.append(f"  {name:32s}{theirs:12.{digits}f}{ours:12.{digits}f}{ours / theirs if theirs else float('nan'):16.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.bench_scm", description=__doc__.partition("\n")[0])
    for key, value in SHAPE.items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--repeat", type=int, default=3, help="timed steps a process (default 3)")
    parser.add_argument("--rounds", type=int, default=2, help="processes a way (default 2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the timed steps; both ways are compared in fp32")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "PART"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = {key: getattr(args, key) for key in SHAPE}
    if args.child:
        print(json.dumps(measure(shape, *args.child, args.repeat, args.threads, args.precision)))
        return
    torch.set_num_threads(args.threads)
    print("same loss and gradients both ways: " + ", ".join(f"{PARTS[part]} {compare(shape, part):.6f}" for part in PARTS))
    print(f"width {32 * args.heads}, {args.layers} blocks, batch {args.batch}, {args.side}x{args.side} latents, {args.tokens} text tokens, {args.precision}, "
          f"{args.threads} thread(s); medians of {args.rounds} x {args.repeat} steps")
    print(table(measure_all(shape, args.rounds, args.repeat, args.threads, args.precision)))


if __name__ == "__main__":
    main()
