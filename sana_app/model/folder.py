"""Model folders: refuse a missing, half-written or damaged one by name before anything is loaded, and write whole ones."""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors import SafetensorError, safe_open

from sana_app.model.controlnet import SanaSprintControlNetModel

# Components whose every tensor is checked against what the class builds from the folder's config.
CHECKED_CLASSES = {c.__name__: c for c in (AutoencoderDC, SanaTransformer2DModel, SanaSprintControlNetModel)}
SAMPLING_FILE = "sampling.json"
CONFIG_FILES = ("config.json", "tokenizer_config.json", "scheduler_config.json")
WEIGHTS = r"(diffusion_pytorch_model|model)%s(-\d+-of-\d+)?\.safetensors"


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the model folder is incomplete; copy or save it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): the folder is damaged; copy or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted an object")
    return content


def read_noise_scale(folder: Path | str) -> float:
    """noise_scale of sampling.json in a model folder, 1 where there is none (published models, hub ids)."""
    path = Path(folder) / SAMPLING_FILE
    if not path.is_file():
        return 1.0
    scale = read_json(path).get("noise_scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= 1:
        raise ValueError(f'{path} holds noise_scale {scale!r}, wanted {{"noise_scale": number above 0, at most 1}}')
    return float(scale)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_folder(folder: Path | str, variant: str | None = None, skip: tuple[str, ...] = ()) -> None:
    """Raise ValueError, saying what came, what was wanted and what to do, unless the folder can be loaded.

    Reads JSON and safetensors headers only. skip: components that the caller passes in ready-made.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}: wanted a folder with model_index.json in it")
    index = read_json(folder / "model_index.json")
    components = {k: v[1] for k, v in index.items() if isinstance(v, list) and v[1] is not None and k not in skip}
    missing = {"tokenizer", "text_encoder", "vae", "transformer", "scheduler"} - set(components) - set(skip)
    if missing:
        raise ValueError(f"{folder}/model_index.json names no {', '.join(sorted(missing))}: not a SANA-Sprint folder")
    if (folder / "controlnet").is_dir() and "controlnet" not in skip:
        components["controlnet"] = SanaSprintControlNetModel.__name__
    for name, class_name in components.items():
        if not any((folder / name / file).is_file() for file in CONFIG_FILES):
            raise ValueError(f"{folder / name} has no config: the model folder is incomplete; copy or save it again")
        if name == "text_encoder" or class_name in CHECKED_CLASSES:
            check_weights(folder / name, CHECKED_CLASSES.get(class_name), variant)


def weight_shapes(folder: Path, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of all safetensors files of a component, from their headers."""
    # a component without files of the wanted variant is loaded from its plain ones
    for suffix in ([re.escape("." + variant)] if variant else []) + [""]:
        files = {p.name for p in folder.glob("*.safetensors") if re.fullmatch(WEIGHTS % suffix, p.name)}
        for index in folder.glob(f"*.safetensors.index{suffix and '.' + variant}.json"):
            files |= set(read_json(index)["weight_map"].values())
        if files:
            break
    if not files:
        raise ValueError(f"{folder} has no safetensors weights: copy or save it again (pickled weights are not loaded)")
    shapes = {}
    for name in sorted(files):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: the model folder is incomplete; copy or save it again")
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is damaged or cut short ({error}): copy or save it again") from error
    return shapes


def check_weights(folder: Path, model_class, variant: str | None = None) -> None:
    """Compare the tensors in the folder with those of the class; every difference is named."""
    found = weight_shapes(folder, variant)
    if model_class is None:
        return
    config = read_json(folder / "config.json")
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in model_class.from_config(config).state_dict().items()}
    problems = [f"{k} is missing" for k in wanted if k not in found]
    problems += [f"{k} is not part of the model" for k in found if k not in wanted]
    problems += [f"{k} is {found[k]}, wanted {wanted[k]}" for k in wanted if k in found and found[k] != wanted[k]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder}: weights and config.json do not belong together: {'; '.join(problems[:5])}{more}")


def check_finite(components: dict[str, torch.nn.Module | None]) -> None:
    """Refuse NaN or infinite weights by tensor name."""
    for component, model in components.items():
        for name, tensor in model.state_dict().items() if model is not None else ():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{component}: {name} holds NaN or infinite values: the training run or the file is broken")


def move_into_place(new: Path, folder: Path) -> None:
    """Put a completely written folder where it belongs. model_index.json goes first and comes last: without it a
    folder is refused, so that one whose writing was interrupted is never taken for a model. Other files stay.
    """
    if not folder.exists():
        new.rename(folder)
        return
    (folder / "model_index.json").unlink(missing_ok=True)
    entries = sorted(new.iterdir(), key=lambda entry: entry.name == "model_index.json")
    for entry in entries:
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    new.rmdir()
