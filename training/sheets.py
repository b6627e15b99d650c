"""Contact sheets: many pictures side by side in one PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


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
