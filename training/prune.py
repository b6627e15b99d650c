"""Depth: which blocks of a model matter, a model with fewer of them, a model with more (SANA-1.5, arXiv 2501.18427).

    python -m training.prune importance MODEL --prompts prompts.txt --out importance.json
    python -m training.prune prune MODEL NEW --keep 20 --importance importance.json
    python -m training.prune grow MODEL NEW --layers 60

MODEL is a pipeline folder, a folder with transformer/ (and controlnet/) in it, or a transformer's own folder; NEW gets
the same layout. Published for 4.8B -> 1.6B: GenEval 0.693 with 60 blocks, 0.571 with 20 untuned, 0.672 after 100 steps of
tuning, so fine-tune what comes out.
"""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open
from torch import nn

from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.folder import CONFIG_FILES, read_json, write_json
from sana_app.model.text import SETTINGS_FILE, TextSettings
from training.base import load_part, weight_variant
from training.importance import block_importance, importance_plot, importance_table, read_prompts
from training.loop import device
from training.text import load_text_encoder

CLASSES = {c.__name__: c for c in (SanaTransformer2DModel, SanaSprintControlNetModel, SanaControlNetModel)}
WHAT_CHANGED = "depth.json"


# ---- blocks -----------------------------------------------------------------------------------------------------


def choose_blocks(importance: list[float], keep: int, protect: int = 1) -> list[int]:
    """The blocks that stay, in order: the first and the last `protect` ones, and the most important of the others."""
    blocks = len(importance)
    if not 2 * protect <= keep < blocks or protect < 1:
        raise ValueError(f"keep={keep}: of {blocks} blocks with {protect} protected at each end, {max(2, 2 * protect)} to {blocks - 1} can stay")
    safe = {*range(protect), *range(blocks - protect, blocks)}
    others = sorted(set(range(blocks)) - safe, key=lambda b: (-importance[b], b))
    return sorted(safe | set(others[: keep - len(safe)]))


def keep_blocks(model: ModelMixin, kept: list[int]) -> None:
    """Leaves out, in place, every transformer block that is not in `kept`."""
    model.transformer_blocks = nn.ModuleList(model.transformer_blocks[b] for b in kept)
    model.register_to_config(num_layers=len(kept))


@torch.no_grad()
def keep_controlnet_blocks(controlnet: ModelMixin, kept: list[int]) -> list[int]:
    """The ControlNet of a pruned transformer; returns the copies that stay.

    Its block c is a copy of transformer block c, so it goes when that one goes. The zero layer of a dropped copy is added
    to that of the copy before it: where the dropped block did nothing, the sum of the residuals stays what it was.
    """
    copies = len(controlnet.transformer_blocks)
    mine = [b for b in kept if b < copies]
    for c in set(range(copies)) - set(mine):
        heir = controlnet.controlnet_blocks[max(b for b in mine if b < c)]  # block 0 always stays
        heir.weight += controlnet.controlnet_blocks[c].weight
        heir.bias += controlnet.controlnet_blocks[c].bias
    controlnet.controlnet_blocks = nn.ModuleList(controlnet.controlnet_blocks[b] for b in mine)
    keep_blocks(controlnet, mine)
    return mine


@torch.no_grad()
def grow_blocks(transformer: SanaTransformer2DModel, layers: int, drop_last: int = 0, seed: int = 0) -> None:
    """Appends, in place, new blocks up to `layers`: random inside, but with output projections of zero, so that each one
    hands its input on unchanged (the paper's "partial preservation" with identity blocks) and yet learns from step 1.

    The paper lets the last 2 of the old 20 blocks go (`drop_last=2`); with 0 the model's output stays bit for bit.
    """
    old = list(transformer.transformer_blocks)
    if not 0 <= drop_last < len(old) or layers <= len(old):
        raise ValueError(f"layers={layers}, drop_last={drop_last}: the model has {len(old)} blocks, wanted more of them and 0 to {len(old) - 1} dropped")
    old = old[: len(old) - drop_last]
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")} | {"num_layers": layers - len(old)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = SanaTransformer2DModel.from_config(config).to(transformer.device, transformer.dtype).transformer_blocks
    for block in new:
        for output in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            for weight in output.parameters():
                weight.zero_()
    transformer.transformer_blocks = nn.ModuleList([*old, *new])
    transformer.register_to_config(num_layers=layers)


# ---- folders ----------------------------------------------------------------------------------------------------


def part_folder(model: Path, part: str) -> Path | None:
    """Where `part` lies: MODEL/part, or MODEL itself if it is a transformer's own folder; None if it has no such part."""
    if (model / part / "config.json").is_file():
        return model / part
    alone = part == "transformer" and (model / "config.json").is_file() and read_json(model / "config.json").get("_class_name") in CLASSES
    return model if alone else None


def load_stored(folder: Path, dtype: torch.dtype | None = None) -> ModelMixin:
    """A transformer or a ControlNet, every tensor checked, in the type it is stored in unless `dtype` is given."""
    name = read_json(folder / "config.json").get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{folder} holds a {name}, wanted one of {', '.join(CLASSES)}")
    variant = weight_variant(folder)
    files = [p for p in sorted(folder.glob("diffusion_pytorch_model*.safetensors")) if variant is None or f".{variant}" in p.name]
    if dtype is None and files:
        with safe_open(files[-1], framework="pt") as tensors:  # plain ones sort behind those of a variant
            dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return load_part(folder, CLASSES[name], dtype or torch.float32).eval()


def load_transformer(model: Path, dtype: torch.dtype | None = None) -> SanaTransformer2DModel:
    folder = part_folder(model, "transformer")
    if folder is None:
        raise ValueError(f"no transformer at {model}: wanted a model folder, or one with transformer/config.json in it")
    return load_stored(folder, dtype)


def check_new_folder(model: Path, new: Path) -> None:
    if new.exists():
        raise ValueError(f"{new} is there already: name a new folder, or move that one away")
    if model.resolve() in new.resolve().parents:
        raise ValueError(f"{new} lies within {model}: name a folder outside it")


def write_model(model: Path, new: Path, parts: dict[str, ModelMixin], changed: dict) -> None:
    """NEW = MODEL with `parts` replaced, whole or not at all. Of a training run's folder only the parts are copied, not
    its checkpoints: those belong to the old depth."""
    half = new.with_name(new.name + ".incomplete")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    whole = (model / "model_index.json").is_file()
    alone = part_folder(model, "transformer") == model
    for entry in () if alone else sorted(model.iterdir()):
        if entry.is_dir() and entry.name not in parts and (whole or any((entry / f).is_file() for f in CONFIG_FILES)):
            shutil.copytree(entry, half / entry.name)
        elif entry.is_file() and (whole or entry.name == SETTINGS_FILE):
            shutil.copy2(entry, half)
    for name, part in parts.items():
        part.save_pretrained(half if alone else half / name)
    write_json(half / WHAT_CHANGED, changed)
    half.rename(new)


def read_importance(file: Path) -> list[float]:
    values = read_json(file).get("importance")
    if not isinstance(values, list) or not all(isinstance(v, float) for v in values):
        raise ValueError(f"{file} has no list \"importance\": wanted what the importance command writes")
    return values


# ---- commands ---------------------------------------------------------------------------------------------------


def measure(model: Path, out: Path, prompts: list[str], steps: int, batch: int, text_encoder: str, keep: int | None, seed: int) -> dict:
    """Writes OUT (json) and a plot beside it (png), and prints the table."""
    # half precision is slow on the CPU, and hides small turns
    transformer = load_transformer(model, torch.float32 if device().type == "cpu" else None).to(device())
    texts = Path(text_encoder or model)
    encode = load_text_encoder(text_encoder or str(model), TextSettings.of_folder(texts).max_tokens)[2]
    found = block_importance(transformer, encode, prompts, steps, batch, seed)
    kept = None if keep is None else choose_blocks(found["importance"], keep)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"model": model.name, **found}, indent=1))
    importance_plot(found, out.with_suffix(".png"), kept)
    print(importance_table(found, kept))
    return found


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def prune(model: Path, new: Path, keep: int, importance: list[float], protect: int = 1, dry_run: bool = False) -> list[int]:
    """Writes NEW with `keep` blocks, and a ControlNet that fits them if there is one; returns the blocks that stayed. A dry run
    says what would be written."""
    check_new_folder(model, new)
    transformer = load_transformer(model)
    blocks = transformer.config.num_layers
    if len(importance) != blocks:
        raise ValueError(f"importance of {len(importance)} blocks, but the model has {blocks}: measure this model")
    kept, before = choose_blocks(importance, keep, protect), parameters(transformer)
    keep_blocks(transformer, kept)
    parts: dict[str, ModelMixin] = {"transformer": transformer}
    changed = {"made_by": "prune", "blocks_before": blocks, "kept": kept, "importance": importance}
    print(f"kept {len(kept)} of {blocks} blocks: {kept}; dropped: {[b for b in range(blocks) if b not in kept]}; "
          f"{parameters(transformer):,} parameters of {before:,}")
    folder = part_folder(model, "controlnet")
    if folder is not None:
        controlnet = load_stored(folder)
        copies = controlnet.config.num_layers
        # residual i enters after block i, i = 1..copies: with those blocks kept, every residual meets the block it was trained for
        if kept[: copies + 1] == list(range(copies + 1)):
            print(f"ControlNet: unchanged; the {copies} blocks it copies, and the one after them, stayed")
        else:
            parts["controlnet"] = controlnet
            mine = changed["controlnet_kept"] = keep_controlnet_blocks(controlnet, kept)
            merged = "" if len(mine) == copies else "; the zero layers of the others were added to those of the copies before them"
            print(f"ControlNet: {len(mine)} of {copies} copied blocks stay{merged}. Residuals now enter after other blocks than they were trained for: tune it as well")
    if dry_run:
        print(f"dry run: {new} is not written")
    else:
        write_model(model, new, parts, changed)
    return kept


def grow(model: Path, new: Path, layers: int, drop_last: int = 0, seed: int = 0, dry_run: bool = False) -> None:
    """Writes NEW with `layers` blocks. A ControlNet fits as it is: new blocks come behind those it copies. A dry run says what
    would be written."""
    check_new_folder(model, new)
    transformer = load_transformer(model)
    before, size = transformer.config.num_layers, parameters(transformer)
    grow_blocks(transformer, layers, drop_last, seed)
    folder = part_folder(model, "controlnet")
    copies = 0 if folder is None else read_json(folder / "config.json")["num_layers"]
    if copies > before - drop_last:
        raise ValueError(f"the ControlNet copies {copies} blocks, but drop_last={drop_last} leaves {before - drop_last} of them: drop fewer")
    if dry_run:
        print(f"dry run: {new} is not written")
    else:
        write_model(model, new, {"transformer": transformer}, {"made_by": "grow", "blocks_before": before, "blocks": layers, "dropped_last": drop_last})
    print(f"{before} -> {layers} blocks, {size:,} -> {parameters(transformer):,} parameters; {layers - before + drop_last} new ones hand their input on unchanged"
          + (f"; the last {drop_last} old ones are gone, so the pictures differ until it is tuned" if drop_last else ", so the pictures are the same"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.prune", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    a = commands.add_parser("importance", help="measure block importance: a table, a json file and a plot")
    a.add_argument("model", type=Path)
    a.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    a.add_argument("--data", type=Path, help="data set (shards or loose pairs) whose captions are the prompts")
    a.add_argument("--count", type=int, default=100, help="how many prompts (default 100)")
    a.add_argument("--steps", type=int, default=8, help="times at which the blocks are measured (default 8)")
    a.add_argument("--batch", type=int, default=8)
    a.add_argument("--text-encoder", default="", help="'minilm' or a model folder, if MODEL has no text_encoder/ of its own")
    a.add_argument("--keep", type=int, help="mark what pruning to so many blocks would drop")
    a.add_argument("--out", type=Path, default=Path("importance.json"))
    a.add_argument("--seed", type=int, default=0)
    b = commands.add_parser("prune", help="write the model with its most important blocks")
    b.add_argument("model", type=Path)
    b.add_argument("new", type=Path)
    b.add_argument("--keep", type=int, required=True)
    b.add_argument("--importance", type=Path, required=True, help="what the importance command wrote")
    b.add_argument("--protect", type=int, default=1, help="blocks that stay at each end whatever their importance (default 1)")
    c = commands.add_parser("grow", help="write the model with more blocks, which change nothing at first")
    c.add_argument("model", type=Path)
    c.add_argument("new", type=Path)
    c.add_argument("--layers", type=int, required=True)
    c.add_argument("--drop-last", type=int, default=0, help="old blocks to leave out at the end (the paper: 2; the pictures then differ)")
    c.add_argument("--seed", type=int, default=0)
    for command in (b, c):
        command.add_argument("--dry-run", action="store_true", help="say what would stay and how large it is; write nothing")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        if args.command == "importance":
            measure(args.model, args.out, read_prompts(args.prompts, args.data, args.count), args.steps, args.batch, args.text_encoder, args.keep, args.seed)
            print(f"wrote {args.out} and {args.out.with_suffix('.png')}")
        elif args.command == "prune":
            prune(args.model, args.new, args.keep, read_importance(args.importance), args.protect, args.dry_run)
        else:
            grow(args.model, args.new, args.layers, args.drop_last, args.seed, args.dry_run)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
