"""What a person may ask for: the bounds of every field, checked once, at the border, before anything is computed."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

import numpy as np

PROMPT_CHARS = 500
STEPS = (1, 2, 4)
SEED_MAX = 2**31 - 1
STRENGTH_MAX = 2.0
GUIDANCE_MAX = 20.0


@dataclass(frozen=True, eq=False)
class RenderRequest:
    """One picture to make. `ink` is uint8 [H, W] with 255 = ink, or None for an empty page (text only)."""

    ink: np.ndarray | None
    prompt: str = ""
    style: str = "none"
    strength: float = 1.0  # conditioning scale of the lines, 0 = lines ignored
    steps: int = 1
    seed: int = 0
    guidance: float = 4.5
    notices: tuple[str, ...] = ()  # what the border had to change, in words for the page


def number(value, name: str, low: float, high: float) -> float:
    """A finite number in [low, high], else ValueError naming the field, what came and what was wanted."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: a number from {low:.10g} to {high:.10g} is wanted, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: a number from {low:.10g} to {high:.10g} is wanted, got {shown(value)}")
    return float(value)


def whole(value, name: str, low: int, high: int) -> int:
    value = number(value, name, low, high)
    if value != int(value):
        raise ValueError(f"{name}: a whole number is wanted, got {value:.10g}")
    return int(value)


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def clean_prompt(text) -> tuple[str, tuple[str, ...]]:
    """The prompt as the model may read it: no control or surrogate characters, at most PROMPT_CHARS; and notices."""
    if not isinstance(text, str):
        raise ValueError(f"prompt: text is wanted, got {type(text).__name__}")
    cut = text[: PROMPT_CHARS + 1].strip() if len(text) > PROMPT_CHARS else text.strip()
    notices = ()
    if len(cut) > PROMPT_CHARS:
        cut = cut[:PROMPT_CHARS]
        notices = (f"The prompt was cut after {PROMPT_CHARS} characters.",)
    cut = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in cut)
    return cut, notices


def check_request(ink: np.ndarray | None, *, prompt="", style="none", strength=1.0, steps=1, seed=0, guidance=4.5,
                  styles) -> RenderRequest:
    """Raw fields from a client -> RenderRequest, or ValueError. `styles` are the names this model knows."""
    prompt, notices = clean_prompt(prompt)
    if style not in styles:
        raise ValueError(f"style: one of {', '.join(styles)} is wanted, got {shown(style)}")
    steps = whole(steps, "steps", STEPS[0], STEPS[-1])
    if steps not in STEPS:
        raise ValueError(f"steps: 1, 2 or 4 is wanted, got {steps}")
    if ink is not None and not ink.any():
        ink = None
    return RenderRequest(
        ink=ink, prompt=prompt, style=style, steps=steps, notices=notices,
        strength=number(strength, "strength", 0, STRENGTH_MAX),
        seed=whole(seed, "seed", 0, SEED_MAX),
        guidance=number(guidance, "guidance", 0, GUIDANCE_MAX),
    )
