"""A real function in the model's place: the picture is the drawing itself.

It lets the transport be measured and checked by itself: what comes back shows which sketch went in.
"""

import time

import numpy as np
from PIL import Image

from sana_app.engine import Rendered, encode_jpeg
from sana_app.presets import EMOJI_STYLES


class EchoEngine:
    name, size, styles = "echo", 256, EMOJI_STYLES

    def __init__(self, delay_s: float = 0.0):
        self.delay_s = delay_s
        self.rendered = 0

    def render(self, request) -> Rendered:
        if self.delay_s:
            time.sleep(self.delay_s)
        self.rendered += 1
        ink = np.zeros((self.size, self.size), np.uint8) if request.ink is None else request.ink
        pixels = np.asarray(Image.fromarray(255 - ink).resize((self.size, self.size)).convert("RGB"))
        return Rendered(pixels, encode_jpeg(pixels), {"echo": 1000 * self.delay_s, "total": 1000 * self.delay_s}, request.notices)
