"""GenEval (djghosh13/geneval, arXiv 2310.11513): writes the pictures its scorer wants, and reads what the scorer found.

    FOLDER/00000/metadata.jsonl          line 0 of evaluation_metadata.jsonl
    FOLDER/00000/samples/00000.png …     four pictures, each with its own seed
    FOLDER/00000/grid.png                the four side by side

Score them in geneval's own environment (it needs a detector and a GPU), then run this command again:

    python evaluation/evaluate_images.py FOLDER --outfile FOLDER/results.jsonl --model-path DETECTOR_FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.cache import once
from training.evaluate import to_tensor
from training.evaluation.layout import claim, read_jsonl, save_picture
from training.evaluation.models import Model, picture_seed
from training.sheets import contact_sheet

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RESULTS = "results.jsonl"


def read_metadata(path: Path, limit: int | None = None) -> list[dict]:
    """The rows of evaluation_metadata.jsonl, one a prompt: tag, include, (exclude,) prompt."""
    rows = list(read_jsonl(path, {"tag": str, "include": list, "prompt": str}))[:limit]
    unknown = sorted({row["tag"] for row in rows} - set(TASKS))
    if unknown or not rows:
        raise ValueError(f"{path}: {len(rows)} prompts with unknown tags {unknown}: wanted evaluation_metadata.jsonl, with {', '.join(TASKS)}")
    return rows


def write_pictures(model: Model, identity: dict, metadata: list[dict], folder: Path, steps: int, samples: int, seed: int) -> None:
    """Makes what is not there yet. A prompt's folder appears whole (under another name until then, which the scorer passes by)."""
    claim(folder, identity | {"benchmark": "geneval", "steps": steps, "samples": samples, "seed": seed})
    for index, row in enumerate(tqdm(metadata, desc=f"GenEval, {steps} steps", mininterval=5)):
        place = folder / f"{index:05d}"
        if place.exists() and json.loads((place / "metadata.jsonl").read_text()) != row:
            raise ValueError(f"{place} answers another prompt than line {index} of the metadata: use another --out, or delete the folder")

        def build(new: Path) -> None:
            (new / "samples").mkdir()
            made = model.make([row["prompt"]] * samples, [picture_seed(seed, "geneval", index, n) for n in range(samples)], steps)
            for n, image in enumerate(made):
                save_picture(image, new / "samples" / f"{n:05d}.png")
            contact_sheet(to_tensor(made), new / "grid.png", 2)
            (new / "metadata.jsonl").write_text(json.dumps(row))
        once(place, build)


def read_results(path: Path, metadata: list[dict], samples: int) -> dict[str, float]:
    """The official summary of the scorer's results.jsonl: per task the share of correct pictures; `geneval` is the mean over tasks.
    Also the shares of all pictures, and of the prompts with at least one correct picture."""
    rows = list(read_jsonl(path, {"filename": str, "tag": str, "prompt": str, "correct": bool}))
    if len(rows) != len(metadata) * samples or {row["prompt"] for row in rows} != {row["prompt"] for row in metadata}:
        raise ValueError(f"{path} judges {len(rows)} pictures, the folder has {samples} of each of {len(metadata)} prompts: score the folder again")
    by_task = {task: [row["correct"] for row in rows if row["tag"] == task] for task in TASKS}
    tasks = {task: float(np.mean(correct)) for task, correct in by_task.items() if correct}
    prompts: dict[str, bool] = {}
    for row in rows:  # prompts are told apart by their folder, FOLDER/00000/samples/00000.png
        place = Path(row["filename"]).parent.parent.name
        prompts[place] = prompts.get(place, False) or row["correct"]
    return {"geneval": float(np.mean(list(tasks.values()))), **{f"geneval_{task}": share for task, share in tasks.items()},
            "geneval_all_pictures": float(np.mean([row["correct"] for row in rows])),
            "geneval_any_of_prompt": float(np.mean(list(prompts.values())))}


def first_of_each_task(metadata: list[dict], folder: Path) -> list[np.ndarray]:
    """Sample 0 of the first prompt of every task, for the contact sheet."""
    firsts = {row["tag"]: index for index, row in reversed(list(enumerate(metadata)))}
    return [np.array(Image.open(folder / f"{firsts[task]:05d}" / "samples" / "00000.png").convert("RGB")) for task in TASKS if task in firsts]
