"""One table (report.md), the same numbers under flat keys (report.json), one contact sheet (contact_sheet.png)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.checkpoint import write_atomic
from training.evaluate import SHEET_ROWS
from training.sheets import write_sheet

# measure -> what it is; a measure of a task or category carries its name behind (geneval_counting)
MEANINGS = {
    "fid": "Fréchet distance to the real pictures of the same prompts in Inception features; grows when there are fewer pictures",
    "kid": "kernel distance to other real pictures in Inception features; unbiased: about 0 for perfect pictures, and below as often as above",
    "fid_own": "the same distance in the project's own features: NOT comparable with published FIDs",
    "kid_own": "the same distance in the project's own features: NOT comparable with published KIDs",
    "fid_unpublished": "the same distance in an Inception of other weights: NOT comparable with published FIDs",
    "kid_unpublished": "the same distance in an Inception of other weights: NOT comparable with published KIDs",
    "clip": "CLIP score, 100 × cosine of picture and prompt",
    "clip_own": "caption score of the project's own, 100 × cosine: NOT comparable with CLIP scores; read it between `real` and `shuffled`",
    "clip_own_top1": "share of pictures that find their caption among 16 (all, where there are fewer) by that score; `real` is what the score itself can do",
    "line_f1": "F1 of the drawn lines and the picture's edges, 3 px at 256 px; chance: real pictures against another's lines",
    "sharpness_ratio": "gradient energy over that of the real pictures",
    "psnr_db": "autoencoder: real pictures there and back, dB",
    "latency_ms": "one picture from prompt to pixels, warm, median",
    "images_per_s": "pictures a second in batches of 10, warm, median",
    "geneval": "GenEval: mean over the tasks of the share of correct pictures, by the official scorer",
    "mjhq_fid": "MJHQ-30K: FID to the reference pictures, overall and by category",
    "mjhq_kid": "MJHQ-30K: KID to the reference pictures",
    "mjhq_fid_own": "MJHQ-30K: distance in the project's own features, NOT comparable with published FIDs",
    "mjhq_kid_own": "MJHQ-30K: distance in the project's own features, NOT comparable with published KIDs",
    "mjhq_clip": "MJHQ-30K: CLIP score",
}
COLUMNS = {"off": "no lines, fewest steps", "vae": "autoencoder only", "real": "real pictures",
           "shuffled": "real, another's caption", "chance": "chance"}


def steps_title(steps: int) -> str:
    return f"{steps} step" + "s" * (steps > 1)


@dataclass
class Report:
    """`numbers[measure][column]`; `about` what they were measured with and on; `notes` what the reader must know, in words."""

    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    about: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, np.ndarray]] = field(default_factory=list)  # of the contact sheet: column title -> picture

    def put(self, column: str, numbers: dict[str, float]) -> None:
        for measure, value in numbers.items():
            self.numbers.setdefault(measure, {})[column] = value

    def flat(self) -> dict[str, object]:
        """{measure}_{column}: value, then what they were measured with."""
        found = {f"{measure}_{column}": round(value, 5) for measure, values in self.numbers.items() for column, value in values.items()}
        return found | self.about | {"notes": self.notes}

    def markdown(self) -> str:
        """The table, what its rows mean, and the notes."""
        used = [column for values in self.numbers.values() for column in values]
        columns = sorted(dict.fromkeys(used), key=lambda c: (c in COLUMNS, list(COLUMNS).index(c) if c in COLUMNS else int(c.removesuffix("step"))))
        titles = [COLUMNS.get(c) or steps_title(int(c.removesuffix("step"))) for c in columns]
        lines = ["| | " + " | ".join(titles) + " |", "|" + "---|" * (len(columns) + 1)]
        for measure, values in self.numbers.items():
            lines.append(f"| {measure} | " + " | ".join(f"{values[c]:.4g}" if c in values else "" for c in columns) + " |")
        meanings = [f"- `{measure}`: {MEANINGS[measure]}" for measure in MEANINGS if measure in self.numbers]
        about = [f"- {key}: {value}" for key, value in self.about.items()]
        return "\n".join([f"# {self.about.get('model', 'model')}", "", *lines, "", *meanings, "", *(f"**{note}**\n" for note in self.notes), *about, ""])

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "report.json", lambda file: file.write((json.dumps(self.flat(), indent=1, ensure_ascii=False) + "\n").encode()))
        write_atomic(out / "report.md", lambda file: file.write(self.markdown().encode()))
        if self.rows:
            titles = list(dict.fromkeys(title for row in self.rows for title in row))
            blank = np.full((8, 8, 3), 255, np.uint8)
            write_sheet({title: [row.get(title, blank) for row in self.rows] for title in titles}, out / "contact_sheet.png")

    def show(self, row: dict[str, np.ndarray]) -> None:
        """One more row of the contact sheet."""
        self.rows.append(row)


def data_rows(columns: dict[str, np.ndarray], benchmarks: int) -> list[dict[str, np.ndarray]]:
    """The first pictures of every column as rows; the sheet keeps room for the benchmarks' rows."""
    count = min(len(next(iter(columns.values()))), max(4, SHEET_ROWS - benchmarks))
    return [{title: pictures[i] for title, pictures in columns.items()} for i in range(count)]
