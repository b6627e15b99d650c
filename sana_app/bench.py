"""What a live frame costs, stage by stage: `python -m sana_app.bench [--model emoji] [--runs 50] [--json]`.

Every run draws one more stroke of a new drawing, as a pen does: the sketch is new, prompt and seed are not. A second
row times the prompt when it changes. The total is canvas to JPEG: from the ink raster to the finished bytes.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # as in app.py, before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sana_app.engine import STAGES, Engine  # noqa: E402
from sana_app.presets import find_model  # noqa: E402
from sana_app.request import RenderRequest  # noqa: E402

WARM_UP_RUNS = 3


def drawings(count: int, side: int = 256, seed: int = 0) -> list[np.ndarray]:
    """A growing drawing: uint8 [side, side] ink, one more short stroke each time."""
    rng, ink, found = np.random.default_rng(seed), np.zeros((side, side), np.uint8), []
    for x, y in rng.integers(10, side - 50, (count, 2)):
        ink[y:y + 3, x:x + 40] = 255
        found.append(ink.copy())
    return found


def measure(engine, runs: int, steps: int = 1) -> dict[str, list[float]]:
    """Stage -> one time in ms per run."""
    times = {stage: [] for stage in (*STAGES, "prompt_cached", "total")}
    side = 256 if engine.size <= 256 else 512
    for i, ink in enumerate(drawings(WARM_UP_RUNS + runs, side)):
        frame = engine.render(RenderRequest(ink=ink, prompt="a red apple", steps=steps)).stages_ms
        words = engine.render(RenderRequest(ink=ink, prompt=f"a red apple {i}", steps=steps)).stages_ms
        if i < WARM_UP_RUNS:
            continue
        for stage in (*STAGES[1:], "total"):
            times[stage].append(frame[stage])
        times["prompt_cached"].append(frame["prompt"])
        times["prompt"].append(words["prompt"])
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sana_app.bench", description="p50 and p95 by stage of a live frame")
    parser.add_argument("--model", default="emoji", help="a preset name or a model folder (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs: at least 1 is wanted, got {args.runs}")
    try:
        engine = Engine.load(find_model(args.model), args.precision)
    except ValueError as error:
        print(f"nothing to measure: {error}", file=sys.stderr)
        return 2
    times = measure(engine, args.runs, args.steps)
    report = {
        "model": engine.name, "size": engine.size, "steps": args.steps, "runs": args.runs,
        "device": str(engine.pipe.device), "dtype": str(engine.pipe.transformer.dtype), "threads": torch.get_num_threads(),
        "stages_ms": {stage: {"p50": float(np.percentile(ms, 50)), "p95": float(np.percentile(ms, 95))}
                      for stage, ms in times.items()},
    }
    print(json.dumps(report) if args.json else table(report))
    return 0


def table(report: dict) -> str:
    notes = {"prompt": "when it changes", "prompt_cached": "when it does not", "total": "canvas to JPEG, prompt cached"}
    head = "{model}, {size} px, {steps} step(s), {runs} runs, {device}, {dtype}, {threads} threads".format(**report)
    rows = [f"{stage.replace('_', ', '):16}{ms['p50']:9.1f}{ms['p95']:9.1f}  {notes.get(stage, '')}".rstrip()
            for stage, ms in report["stages_ms"].items()]
    return "\n".join([head, f"{'stage':16}{'p50 ms':>9}{'p95 ms':>9}", *rows])


if __name__ == "__main__":
    sys.exit(main())
