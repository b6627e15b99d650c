"""Block importance of a SANA transformer: 1 - E[cos(block input, block output)] (SANA-1.5, arXiv 2501.18427, depth pruning).

A block that turns its input little can be left out. Measured where a picture is made: along the sampling path of the
model itself, at every time it visits, over many prompts. Base, teacher and Sprint models alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as nnf
from tqdm import tqdm

from sana_app.model import trigflow
from sana_app.model.network import TrigFlowTeacher
from training.data.shards import read_samples

SIGMA_DATA = trigflow.SIGMA_DATA
Encode = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]  # prompts -> (states [B, L, C], mask [B, L])


def turn(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cos(before, after), mean over the tokens: [B, N, D] twice -> [B]."""
    return 1 - nnf.cosine_similarity(before.float(), after.float(), dim=-1).mean(dim=1)


@contextmanager
def watched(blocks: torch.nn.ModuleList) -> Iterator[list[torch.Tensor]]:
    """While open, every forward of a block appends its `turn` [B] to the list, in the order of the blocks."""
    found: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda module, args, output: found.append(turn(args[0], output))) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def importance_of_batch(transformer: SanaTransformer2DModel, text: torch.Tensor, mask: torch.Tensor, noise: list[torch.Tensor],
                        guidance: float = 4.5) -> torch.Tensor:
    """Turn of every block at every time: [B, times, blocks], for len(noise) even angles from pi/2 down.

    `noise`: unit variance [B, C, h, w] each. A flow model follows its ODE (text only, without guidance: the blocks are
    asked, not the picture); a Sprint model jumps to x0 and is re-noised, as it is used.
    """
    net = TrigFlowTeacher(transformer)
    times = trigflow.ode_timesteps(len(noise))
    x = noise[0] * SIGMA_DATA
    turns = []
    for i, (t, u) in enumerate(zip(times[:-1], times[1:])):
        with watched(transformer.transformer_blocks) as found:
            F = net(x / SIGMA_DATA, torch.full((len(x),), t, device=x.device), text, mask, guidance=guidance)
        turns.append(torch.stack(found, dim=1))                                            # [B, blocks]
        if transformer.config.guidance_embeds:
            fresh = noise[(i + 1) % len(noise)] * SIGMA_DATA
            x = trigflow.interpolate(trigflow.clean_from_F(x, F, t), fresh, u)
        else:
            x = trigflow.ode_step(x, F, t, u)
    return torch.stack(turns, dim=1)


def block_importance(transformer: SanaTransformer2DModel, encode: Encode, prompts: list[str], steps: int = 8, batch: int = 8,
                     seed: int = 0) -> dict:
    """Means over prompts: {"importance": one a block, "times": angles, "by_time": [times][blocks], "prompts": count}."""
    if not prompts:
        raise ValueError("no prompts to measure with: wanted about 100, one a line, or a data set with captions")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps={steps}, batch={batch}: wanted at least 1 of each")
    config, where = transformer.config, next(transformer.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    total = torch.zeros(steps, config.num_layers, dtype=torch.float64)
    for start in tqdm(range(0, len(prompts), batch), desc="importance", unit="batch"):
        text, mask = encode(prompts[start : start + batch])
        shape = (len(text), config.in_channels, config.sample_size, config.sample_size)
        noise = [torch.randn(shape, generator=draws).to(where) for _ in range(steps)]
        total += importance_of_batch(transformer, text.to(where), mask.to(where), noise).double().sum(dim=0).cpu()
    by_time = total / len(prompts)
    if not torch.isfinite(by_time).all():
        raise ValueError("the blocks' outputs are not finite: the weights are broken, or too large for half precision")
    return {"importance": by_time.mean(dim=0).tolist(), "times": trigflow.ode_timesteps(steps)[:-1], "by_time": by_time.tolist(),
            "prompts": len(prompts)}


def read_prompts(file: Path | None, data: Path | None, count: int) -> list[str]:
    """The first `count` prompts of a text file (one a line, blank lines left out), or first captions of a data set."""
    if (file is None) == (data is None):
        raise ValueError("wanted prompts from one place: --prompts FILE (one a line) or --data FOLDER")
    if file is None:
        return [sample.captions[0] for sample in islice(read_samples(data, "train"), count)]
    if not file.is_file():
        raise ValueError(f"no file of prompts at {file}: wanted a text file with one prompt a line")
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return list(islice((line for line in lines if line), count))


# ---- showing it -------------------------------------------------------------------------------------------------


def importance_table(found: dict, kept: list[int] | None = None) -> str:
    """One line a block: importance, the least and the most over the times, rank; with `kept`, which go."""
    by_block = list(zip(*found["by_time"]))
    rank = {b: r + 1 for r, b in enumerate(sorted(range(len(by_block)), key=lambda b: -found["importance"][b]))}
    lines = ["block  importance  over the times     rank"]
    for b, (value, times) in enumerate(zip(found["importance"], by_block)):
        fate = "" if kept is None or b in kept else "  dropped"
        lines.append(f"{b:5d}  {value:10.4f}  {min(times):.4f} to {max(times):.4f}  {rank[b]:4d}{fate}")
    return "\n".join(lines)


def importance_plot(found: dict, path: Path, kept: list[int] | None = None) -> None:
    """Bars, one a block, with the range over the times as a thin line; blocks that are not in `kept` are pale."""
    values, by_block = found["importance"], list(zip(*found["by_time"]))
    bar, left, top, height = 26, 70, 50, 260
    top_value = max(max(map(max, by_block)), 1e-6)
    unit = 10 ** math.floor(math.log10(top_value))
    top_value = unit / 2 * math.ceil(2 * top_value / unit)
    picture = Image.new("RGB", (max(320, left + bar * len(values) + 30), top + height + 60), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    y = lambda value: top + height - value / top_value * height
    for part in range(5):
        value = top_value * part / 4
        draw.line([(left, y(value)), (picture.width - 20, y(value))], fill="#dddddd")
        draw.text((left - 8, y(value)), f"{value:.3g}", fill="#444444", font=font, anchor="rm")
    for b, (value, times) in enumerate(zip(values, by_block)):
        x = left + bar * b
        dropped = kept is not None and b not in kept
        draw.rectangle([x + 4, min(y(value), top + height - 1), x + bar - 4, top + height], fill="#c9d4e3" if dropped else "#2b5d9b")
        draw.line([(x + bar // 2, y(min(times))), (x + bar // 2, y(max(times)))], fill="#e07b00", width=2)
        draw.text((x + bar // 2, top + height + 12), str(b), fill="#444444", font=font, anchor="mm")
    draw.text((12, 14), f"block importance: {found['prompts']} prompts, {len(found['times'])} times", fill="black", font=font, anchor="lm")
    if kept is not None:
        draw.text((12, 32), f"pale: dropped; {len(kept)} of {len(values)} blocks stay", fill="#444444", font=font, anchor="lm")
    draw.text((left + bar * len(values) / 2, top + height + 40), "block", fill="#444444", font=font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
