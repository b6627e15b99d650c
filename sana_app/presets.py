"""The models the page can run.

| name        | what                                                 | where                                     |
|-------------|------------------------------------------------------|-------------------------------------------|
| emoji       | trained by this repository, ships with it            | assets/models/emoji                       |
| sprint-0.6b | published SANA-Sprint, 1024 px, text only until a    | the Hugging Face hub (downloaded once)    |
| sprint-1.6b | ControlNet is trained for it (put in controlnet/)    |                                           |
| PATH        | any folder in the same layout                        | the disk                                  |
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Style name -> words appended to the caption. The emoji words are those of the training captions.
EMOJI_STYLES = {"none": "", **{name: f"{name} style" for name in ("fluent", "flat", "3d", "noto", "twemoji")}}
OPEN_STYLES = {"none": "", "photo": "photograph, natural light", "watercolour": "watercolour painting",
               "ink": "ink drawing", "3d": "3d render"}


@dataclass(frozen=True)
class Preset:
    name: str
    source: str  # a folder, or a Hugging Face id
    styles: dict[str, str] = field(default_factory=lambda: OPEN_STYLES)


PRESETS = {
    "emoji": Preset("emoji", str(ROOT / "assets" / "models" / "emoji"), EMOJI_STYLES),
    "sprint-0.6b": Preset("sprint-0.6b", "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"),
    "sprint-1.6b": Preset("sprint-1.6b", "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"),
}


def styled(prompt: str, words: str) -> str:
    """The caption as in training: `"a red apple, 3d style"`; either part may be missing."""
    return ", ".join(part for part in (prompt.strip(), words) if part)


def find_model(name: str) -> Preset:
    """A preset name or a path -> Preset; ValueError says what came, what was wanted, what to do. The folder itself is
    checked when it is loaded (sana_app/model/folder.py)."""
    if name in PRESETS:
        return PRESETS[name]
    if "/" not in name and "\\" not in name and not Path(name).is_dir():
        raise ValueError(f"no model is called {name!r}. Wanted: one of {', '.join(PRESETS)}, or the path of a model "
                         f"folder (a path has a slash: ./{name}).")
    folder = Path(name).expanduser().resolve()
    if folder == Path(PRESETS["emoji"].source):
        return PRESETS["emoji"]
    return Preset(folder.name, str(folder), folder_styles(folder))


def folder_styles(folder: Path) -> dict[str, str]:
    """A 384-channel text encoder is the emoji recipe's MiniLM, trained on the emoji captions; others read free words."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return OPEN_STYLES
    return EMOJI_STYLES if config.get("caption_channels") == 384 else OPEN_STYLES
