"""Contact sheets: many pictures side by side in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from training.checkpoint import write_atomic

CELL_PX = 128


def contact_sheet(pictures: torch.Tensor, path: Path, columns: int) -> None:
    """[N, 3, H, W] in [-1, 1] -> one PNG at `path`, row by row."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
    for i, picture in enumerate(pictures.detach().float().cpu()):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        sheet[:, top:top + height, left:left + width] = picture.clamp(-1, 1)
    pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_sheet(columns: dict[str, np.ndarray], path: Path) -> None:
    """Columns of pictures (uint8 [N, S, S, 3] each) in one PNG, two halves side by side, names above."""
    cell, gap, head = CELL_PX, 4, 20
    count = len(next(iter(columns.values())))
    half = -(-count // 2)
    width = len(columns) * (cell + gap)
    sheet = Image.new("RGB", (2 * width + 3 * gap, head + half * (cell + gap)), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for c, (name, pictures) in enumerate(columns.items()):
        for i in range(count):
            left, row = (i // half) * (width + 3 * gap) + c * (cell + gap), i % half
            if row == 0:
                pen.text((left + 4, 3), name, fill="black", font_size=13)
            picture = Image.fromarray(pictures[i]).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, head + row * (cell + gap)))
    write_atomic(path, lambda file: sheet.save(file, "PNG", optimize=True))
