"""Measures a model folder on held-out concepts: prints a table, writes metrics.json and contact_sheet.png beside the model.

    python -m training.evaluate --model assets/models/emoji --data runs/data/emoji-128

What each number means is said by `KEYS`, and by the function of training.metrics that makes it.
"""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch

from sana_app.lines import condition_from_ink
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.trigflow import sprint_timesteps
from training import metrics
from training.autoencoder import psnr_db
from training.checkpoint import write_atomic
from training.config import Config
from training.data.cache import Pixels, pixel_cache
from training.data.captions import article, styled, with_colour
from training.data.colour import hue_of, recolour
from training.data.emoji import PEOPLE
from training.data.sources import has_held_out, parse_mixture
from training.distributed import device, is_main
from training.sheets import write_sheet

STEPS = (1, 2, 4)
EMOJI, SAMPLE = Path("runs/data/emoji-128"), Path("assets/sample")
COLOURS = ("red", "yellow", "green", "blue")
SHEET_ROWS = 32
BATCH = 16
KEYS = {  # key without its _1step, _2step, _4step and _off (without ControlNet; without a number: 1 step) -> what it is
    "psnr_db": "autoencoder: real pictures there and back, dB",
    "line_f1": "F1 of the drawn lines and the edges of the picture, 3 px at 256 px",
    "line_f1_real": "the same for the real pictures: the ceiling",
    "line_f1_chance": "the same for the real picture of another drawing: the floor",
    "sharpness_ratio": "gradient energy over that of the real pictures",
    "sharpness_ratio_vae": "the same for real pictures through the autoencoder: the ceiling",
    "prompt_colour_shift": "red against blue in the prompt, same lines: change of the figure's mean colour (1 = as much as recolouring the real picture)",
    "prompt_colour_right": f"share of pictures whose main hue is the one named, out of {', '.join(COLOURS)} (chance {1 / len(COLOURS)})",
    "seed_diversity": "pixel distance between seeds, same lines and prompt, over that between different real pictures",
    "latency_ms": "p50 of one picture: fp32, one step, no cache",
}


@dataclass
class Pictures:
    """The chosen held-out pictures, N of them."""

    images: np.ndarray      # uint8 [N, S, S, 3]
    inks: np.ndarray        # uint8 [N, S, S]
    prompts: list[str]
    meta: list[dict]

    def some(self, rows: list[int]) -> Pictures:
        return Pictures(self.images[rows], self.inks[rows], [self.prompts[i] for i in rows], [self.meta[i] for i in rows])


def choose(pixels: Pixels, count: int, seed: int) -> Pictures:
    """At most `count` pictures, one per (concept, style) and none skin-toned; concepts go round before styles repeat."""
    order = np.random.default_rng(seed).permutation(len(pixels.meta))
    concepts, styles, places = {}, {}, {}
    for i in map(int, order):
        about = pixels.meta[i]
        if not about.get("toned"):
            concept, style = about.get("concept", i), about.get("style", "")
            concepts.setdefault(concept, len(concepts))
            styles.setdefault(style, len(styles))
            places.setdefault((concept, style), i)
    turn = {i: ((styles[s] - concepts[c]) % len(styles), concepts[c]) for (c, s), i in places.items()}
    rows = sorted(turn, key=turn.get)[:count]
    return Pictures(np.array(pixels.images[rows]), np.array(pixels.inks[pixels.first_ink[rows]]),
                    [pixels.captions[i][0] for i in rows], [pixels.meta[i] for i in rows])


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def generate(pipe: SanaSprintControlNetPipeline, inks: np.ndarray, prompts: list[str], seeds: list[int], steps: int = 1,
             scale: float = 1.0) -> np.ndarray:
    """Pictures uint8 [N, S, S, 3]; each has its own seed, so that the size of the batch changes nothing."""
    made = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        lines = torch.cat([condition_from_ink(ink, pipe.default_size) for ink in inks[part]]) if scale else None
        out = pipe(prompts[part], lines, scale, steps, generator=[torch.Generator().manual_seed(s) for s in seeds[part]], output_type="pt")
        made.append(to_uint8(out.images.float() * 2 - 1))
    return np.concatenate(made)


# ---- the parts of the report ------------------------------------------------------------------------------------


def autoencoder_numbers(pipe: SanaSprintControlNetPipeline, pictures: Pictures) -> dict[str, float]:
    """Real pictures there and back: encode_condition is the way of any picture into unit-scale latents."""
    x = to_tensor(pictures.images)
    y = torch.cat([pipe.decode(pipe.encode_condition(block)) for block in x.split(BATCH)])
    return {"psnr_db": float(psnr_db(y, x).mean()), "sharpness_ratio_vae": metrics.sharpness_ratio(to_uint8(y), pictures.images)}


def mean_line_f1(inks: np.ndarray, images: np.ndarray) -> float:
    return float(np.mean([metrics.line_f1(ink, image) for ink, image in zip(inks, images)]))


def line_numbers(pictures: Pictures, columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Line fidelity and sharpness of every generated column (`1step`, …, `off`, `2step_off`, …)."""
    found = {"line_f1_real": mean_line_f1(pictures.inks, pictures.images),
             "line_f1_chance": mean_line_f1(pictures.inks, np.roll(pictures.images, 1, axis=0))}
    for name, made in columns.items():
        found[f"line_f1_{name}"] = mean_line_f1(pictures.inks, made)
        found[f"sharpness_ratio_{name}"] = metrics.sharpness_ratio(made, pictures.images)
    return found


def colour_numbers(pipe: SanaSprintControlNetPipeline, pictures: Pictures, seeds: list[int]) -> dict[str, float]:
    """Prompts that name four colours over the same lines and seeds. Only things that training recolours too: coloured, not people."""
    figures = [metrics.figure_mask(image) for image in pictures.images]
    alphas = [figure.astype(np.uint8) * 255 for figure in figures]
    rows = [i for i, about in enumerate(pictures.meta)
            if about.get("label") and about.get("group") != PEOPLE and hue_of(pictures.images[i], alphas[i])[1] > 0.3]
    if not rows:
        return {}
    part, part_seeds = pictures.some(rows), [seeds[i] for i in rows]
    prompts = {c: [styled(article(with_colour(about["label"], c)), about["style"]) for about in part.meta] for c in COLOURS}
    real = sum(metrics.colour_shift(*(recolour(pictures.images[i], alphas[i], c) for c in ("red", "blue")), figures[i]) for i in rows)
    found: dict[str, float] = {"prompt_colour_count": len(rows)}
    for steps in STEPS:
        made = {c: generate(pipe, part.inks, prompts[c], part_seeds, steps) for c in COLOURS}
        shift = sum(metrics.colour_shift(made["red"][j], made["blue"][j], figures[i]) for j, i in enumerate(rows))
        right = sum(metrics.nearest_colour(made[c][j], figures[i], COLOURS) == c for j, i in enumerate(rows) for c in COLOURS)
        found |= {f"prompt_colour_shift{_at(steps)}": shift / real, f"prompt_colour_right{_at(steps)}": right / (len(rows) * len(COLOURS))}
    return found


def _at(steps: int) -> str:
    """The ending of a key: none for one step."""
    return "" if steps == 1 else f"_{steps}step"


def diversity_numbers(pipe: SanaSprintControlNetPipeline, pictures: Pictures, seed: int, drawings: int = 16, seeds: int = 4) -> dict[str, float]:
    part = pictures.some(list(range(min(drawings, len(pictures.prompts)))))
    apart = metrics.pairwise_distance(part.images)
    found = {}
    for name, steps, scale in ((f"seed_diversity{_at(n)}{off}", n, 0.0 if off else 1.0) for off in ("", "_off") for n in STEPS):
        made = np.stack([generate(pipe, part.inks, part.prompts, [seed + 1 + n] * len(part.prompts), steps, scale) for n in range(seeds)])
        found[name] = float(np.mean([metrics.pairwise_distance(made[:, i]) for i in range(len(part.prompts))])) / apart
    return found


def latency_numbers(pipe: SanaSprintControlNetPipeline, pictures: Pictures, runs: int) -> dict[str, float]:
    """Whole pictures, one at a time, after two to warm up: each part of a one-step one by itself, then one of 2 and of 4 steps, and
    one without ControlNet."""
    clocks: dict[str, list[float]] = {}

    def timed(name: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = work(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clocks.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
            return result
        return call

    modules = {"controlnet": pipe.controlnet, "transformer": pipe.transformer}
    for name, module in modules.items():
        module.forward = timed(name, module.forward)
    text, condition = timed("text", pipe.encode_prompt), timed("condition", pipe.encode_condition)
    decode = timed("decode", pipe.decode)

    @torch.no_grad()
    def picture(i: int, steps: int = 1, lines: bool = True) -> None:
        embeds, mask = text(pictures.prompts[i])
        cond = condition(condition_from_ink(pictures.inks[i], pipe.default_size)) if lines else None
        noise = pipe.noise(pipe.default_size, pipe.default_size, torch.Generator().manual_seed(i))
        decode(pipe.denoise(noise, embeds, mask, cond, timesteps=sprint_timesteps(steps)))

    try:
        whole = timed("p50", picture)
        for run in range(runs + 2):
            whole(run % len(pictures.prompts))
        parts = {name: times[:] for name, times in clocks.items()}
        for name, settings in (("p50_2step", {"steps": 2}), ("p50_4step", {"steps": 4}), ("p50_off", {"lines": False})):
            whole = timed(name, picture)
            for run in range(runs + 2):
                whole(run % len(pictures.prompts), **settings)
            parts[name] = clocks[name]
    finally:
        for module in modules.values():
            del module.forward  # the class's own method shows again
    return {f"latency_ms_{name}": float(np.median(times[2:])) for name, times in parts.items()}


# ---- the report -------------------------------------------------------------------------------------------------


def model_hash(folder: Path) -> str:
    """Hash of everything that makes the pictures: weights, configs, tokenizer. Reports and READMEs do not count."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and (p.parent != folder or p.name in ("model_index.json", "prompt.json", "sampling.json"))):
        whole.update(f"{path.relative_to(folder).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{busy}"


def evaluate(model: Path, data: Path | str, split: str, count: int, seed: int, out: Path, cache: Path, runs: int = 20) -> dict:
    """All numbers of a model folder; writes OUT/metrics.json and OUT/contact_sheet.png. ValueError names what is wrong with the input."""
    pipe = SanaSprintControlNetPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device())
    if pipe.controlnet is None:
        raise ValueError(f"{model} has no controlnet folder: there are no lines to follow")
    pixels = pixel_cache(data, split, pipe.default_size, cache)
    if split == "val" and not all(has_held_out(spec) for spec, _ in parse_mixture(str(data))):
        split = "train (no held-out part)"
        print(f"{data} has no held-out part (val-*.tar shards): these are numbers on training pictures, if the model was trained on them")
    pictures = choose(pixels, count, seed)
    seeds = [seed + i for i in range(len(pictures.prompts))]
    cv2.setNumThreads(1)

    found = autoencoder_numbers(pipe, pictures)
    columns = {f"{n}step": generate(pipe, pictures.inks, pictures.prompts, seeds, n) for n in STEPS}
    columns |= {f"{_at(n)}_off".removeprefix("_"): generate(pipe, pictures.inks, pictures.prompts, seeds, n, scale=0.0) for n in STEPS}
    found |= line_numbers(pictures, columns)
    found["sharpness_ratio"] = found["sharpness_ratio_1step"]
    found |= colour_numbers(pipe, pictures, seeds)
    found |= diversity_numbers(pipe, pictures, seed)
    found |= latency_numbers(pipe, pictures, runs)
    found = {key: round(value, 4) for key, value in found.items()}
    found |= {"split": split, "count": len(pictures.prompts), "concepts": len({m.get("concept", i) for i, m in enumerate(pictures.meta)}),
              "seed": seed, "steps": list(STEPS), "size_px": pipe.default_size, "data_hash": pixels.hash, "model_hash": model_hash(model),
              "hardware": hardware(), "python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers", "transformers")}}

    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "metrics.json", lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    drawn = np.repeat(255 - pictures.inks[..., None], 3, 3)
    sheet = {"lines": drawn, "1 step": columns["1step"], "2 steps": columns["2step"], "4 steps": columns["4step"],
             "1 step, no lines": columns["off"], "real": pictures.images}
    write_sheet({name: pictures[:SHEET_ROWS] for name, pictures in sheet.items()}, out / "contact_sheet.png")
    return found


def evaluate_run(config: Config, out: Path) -> None:
    """The last stage of the chain: the numbers of OUT/model on the recipe's data, unless they are there already."""
    model, report = out / "model", out / "model" / "metrics.json"
    if not (model / "model_index.json").exists():
        raise ValueError(f"{model} is missing: run the export stage first")
    if not is_main():
        return
    if report.exists() and json.loads(report.read_text()).get("model_hash") == model_hash(model):
        print(f"evaluate: {report} is about these weights already")
        return
    print(table(evaluate(model, config.data, "val", config.evaluate_count, config.seed, model, out / "cache")))


def table(found: dict) -> str:
    """One line a measure, its steps side by side."""
    lines = []
    for key, meaning in KEYS.items():
        family = rf"{key}(_\d+step)?(_off)?$" if key != "latency_ms" else rf"{key}_.*"
        values = [f"{name.removeprefix(key).strip('_') or 'all'} {value:g}" for name, value in found.items() if re.match(family, name)]
        lines += [f"{key}: {meaning}", "    " + "   ".join(values)] if values else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("assets/models/emoji"), help="model folder with a controlnet in it")
    parser.add_argument("--data", type=Path, help="folder of shards, or of NAME.png + NAME.txt (default: the emoji set where it was built, else the sample)")
    parser.add_argument("--split", default="val", help="which shards (default: %(default)s)")
    parser.add_argument("--count", type=int, default=128, help="pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and of the noise")
    parser.add_argument("--out", type=Path, help="where metrics.json and contact_sheet.png go (default: the model folder)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where decoded pictures are kept")
    args = parser.parse_args()
    if args.count < 2:
        parser.error(f"--count {args.count}: wanted at least 2 pictures")
    try:
        data = args.data or (EMOJI if EMOJI.is_dir() else SAMPLE)
        found = evaluate(args.model, data, args.split, args.count, args.seed, args.out or args.model, args.cache)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(found))
    print(f"{found['count']} pictures of {found['concepts']} concepts, split {found['split']}; {found['hardware']}")


if __name__ == "__main__":
    main()
