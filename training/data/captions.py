"""Captions of one picture: several paraphrases, with and without the style and the colour."""

from __future__ import annotations

import numpy as np

from sana_app.presets import styled as with_words

# Hue in degrees of each colour word the captions use.
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 125, "teal": 178, "blue": 218, "purple": 275, "pink": 325}
GREYS = ("black", "white", "grey")
COLOUR_WORDS = frozenset(HUES) | frozenset(GREYS) | {"brown", "gray"}


def styled(text: str, style: str | None) -> str:
    """A caption with the style's name, in the form the page uses too."""
    return with_words(text, f"{style} style" if style else "")


def with_colour(label: str, colour: str) -> str:
    """`label` with its own colour words replaced by `colour`."""
    words = [w for w in label.split() if w.lower() not in COLOUR_WORDS]
    return " ".join([colour, *words])


def article(label: str) -> str:
    return ("an " if label[:1].lower() in "aeiou" else "a ") + label


def captions(label: str, tags: list[str], style: str, colour: str | None, recoloured: bool,
             rng: np.random.Generator) -> list[str]:
    """Captions for one picture, most useful first, no repeats. A recoloured picture always names its colour."""
    label = label.replace(":", ",").strip()
    if recoloured and colour:
        name = with_colour(label, colour)
        found = [styled(name, style), styled(article(name), style), name, styled(f"{colour}, {tags[0]}" if tags else colour, style)]
    else:
        found = [styled(label, style), styled(article(label), style), label]
        if colour:
            found.append(styled(with_colour(label, colour), style))
        chosen = list(rng.permutation(tags)[:2]) if tags else []
        if chosen:
            found.append(styled(", ".join(chosen), style))
        found.append(styled("", style))
    return list(dict.fromkeys(found))
