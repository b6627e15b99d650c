"""The models the page can run, and the check of a model folder before anything heavy is read.

| name        | what                                                 | where                                     |
|-------------|------------------------------------------------------|-------------------------------------------|
| emoji       | trained by this repository, ships with it            | assets/models/emoji                       |
| sprint-0.6b | published SANA-Sprint, 1024 px, text only until a    | the Hugging Face hub (downloaded once)    |
| sprint-1.6b | ControlNet is trained for it (put in controlnet/)    |                                           |
| PATH        | any folder in the same layout                        | the disk                                  |
"""

from __future__ import annotations

import json
import struct
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

    @property
    def local(self) -> bool:
        return Path(self.source).is_dir()


PRESETS = {
    "emoji": Preset("emoji", str(ROOT / "assets" / "models" / "emoji"), EMOJI_STYLES),
    "sprint-0.6b": Preset("sprint-0.6b", "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"),
    "sprint-1.6b": Preset("sprint-1.6b", "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"),
}
HUB = {"sprint-0.6b", "sprint-1.6b"}


def styled(prompt: str, words: str) -> str:
    """The caption as in training: `"a red apple, 3d style"`; either part may be missing."""
    return ", ".join(part for part in (prompt.strip(), words) if part)


def find_model(name: str) -> Preset:
    """A preset name or a path -> Preset with a checked folder; ValueError says what came, what was wanted, what to do."""
    if name in HUB:
        return PRESETS[name]
    if name in PRESETS:
        preset = PRESETS[name]
    elif "/" in name or "\\" in name or Path(name).is_dir():
        folder = Path(name).expanduser()
        shipped = folder.resolve() == Path(PRESETS["emoji"].source)
        preset = PRESETS["emoji"] if shipped else Preset(folder.resolve().name, str(folder), folder_styles(folder))
    else:
        raise ValueError(f"no model is called {name!r}. Wanted: one of {', '.join(PRESETS)}, or the path of a model "
                         f"folder (a path has a slash: ./{name}).")
    check_folder(Path(preset.source))
    return preset


def folder_styles(folder: Path) -> dict[str, str]:
    """A 384-channel text encoder is the emoji recipe's MiniLM, trained on the emoji captions; others read free words."""
    try:
        config = json.loads((folder / "transformer" / "config.json").read_text())
    except (OSError, ValueError):
        return OPEN_STYLES
    return EMOJI_STYLES if config.get("caption_channels") == 384 else OPEN_STYLES


def check_folder(folder: Path) -> None:
    """A missing, incomplete or half-written model folder raises ValueError before any weight is read."""
    wanted = "a model folder holds model_index.json and one folder for each part it names"
    fix = "Copy or export the folder again, or choose another --model."
    if not folder.is_dir():
        raise ValueError(f"the model folder {folder} does not exist. Wanted: {wanted}. {fix}")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = [name for name, spec in index.items() if isinstance(spec, list) and spec[0] is not None]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder} has no readable model_index.json ({error}). Wanted: {wanted}. {fix}") from None
    for required in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        if required not in parts:
            raise ValueError(f"{folder}/model_index.json names no {required!r}; it names {', '.join(parts)}. {fix}")
    if (folder / "controlnet").is_dir() and "controlnet" not in parts:
        parts.append("controlnet")
    for part in parts:
        check_part(folder / part, fix)


def check_part(folder: Path, fix: str) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"the model part {folder} is missing or empty. {fix}")
    if folder.name in ("tokenizer", "scheduler"):
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        came = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(f"the model part {folder} holds {came}. Wanted: config.json and *.safetensors. {fix}")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if absent := sorted(shards - {p.name for p in weights}):
            raise ValueError(f"the model part {folder} lacks {', '.join(absent)}. {fix}")
    for file in weights:
        came, wanted = file.stat().st_size, promised_bytes(file)
        if came != wanted:
            raise ValueError(f"{file} is half-written: {came} bytes came, its header promises {wanted}. {fix}")


def promised_bytes(file: Path) -> int | str:
    """How long a safetensors file must be by its own header: 8 + header + the end of its last tensor."""
    try:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > 100_000_000:
                return "a safetensors header"
            tensors = json.loads(f.read(length))
        return 8 + length + max((t["data_offsets"][1] for k, t in tensors.items() if k != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError):
        return "a safetensors header"
