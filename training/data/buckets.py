"""Multi-aspect buckets: shapes of about the same number of pixels, of which every picture takes the one nearest to its own."""

from __future__ import annotations

from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

# SANA's published tables: "height/width" -> [height, width]
PUBLISHED = {512: ASPECT_RATIO_512_BIN, 1024: ASPECT_RATIO_1024_BIN, 2048: ASPECT_RATIO_2048_BIN, 4096: ASPECT_RATIO_4096_BIN}


def bucket_table(size_px: int, multiple: int) -> dict[str, tuple[int, int]]:
    """Buckets of about size_px² pixels with sides that `multiple` (the VAE's factor times the patch size) divides.

    The published table where there is one and it fits; else the published shapes at 1024 px, scaled and brought to multiples. The
    ratio of a bucket is that of its sides, so none is stretched. ValueError when size_px is no multiple itself.
    """
    if size_px % multiple:
        raise ValueError(f"size_px={size_px} with buckets: wanted a multiple of {multiple}, the autoencoder's compression times the patch size")
    published = PUBLISHED.get(size_px, {})
    if not published or any(int(side) % multiple for sides in published.values() for side in sides):
        near = lambda side: max(multiple, round(side * size_px / 1024 / multiple) * multiple)
        published = {ratio: (near(h), near(w)) for ratio, (h, w) in ASPECT_RATIO_1024_BIN.items()}
        # rounding may change the area of a small shape by much: such ones are left out
        published = {r: (h, w) for r, (h, w) in published.items() if 0.8 <= h * w / size_px ** 2 <= 1.25}
    shapes = dict.fromkeys((int(h), int(w)) for h, w in published.values())
    return {f"{h / w:.6f}": (h, w) for h, w in shapes}


def nearest(shape: tuple[int, ...], table: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the bucket for a picture of `shape`, by the published rule: the smallest difference of height/width."""
    return PixArtImageProcessor.classify_height_width_bin(shape[0], shape[1], table)
