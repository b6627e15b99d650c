"""Prompt -> token states and mask, one function for Gemma-2 (long instruction in front) and BERT / MiniLM (none)."""

import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

SETTINGS_FILE = "prompt.json"
# The published "complex human instruction" lives in the stock pipeline's signature.
SANA_INSTRUCTION = "\n".join(
    inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
)


@dataclass(frozen=True)
class TextSettings:
    """How a model wants its prompts; prompt.json in the model folder holds the same two keys."""

    max_tokens: int = 300  # token states given to the transformer, special tokens included
    instruction: str = SANA_INSTRUCTION  # text put in front of every prompt; "" for none

    @classmethod
    def of_folder(cls, folder: Path | str, text_encoder=None) -> "TextSettings":
        """prompt.json if the folder has one, else what fits the text encoder."""
        path = Path(folder) / SETTINGS_FILE
        if not path.is_file():
            return cls.fitting(text_encoder)
        try:
            settings = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not (type(settings.max_tokens) is int and settings.max_tokens > 0 and type(settings.instruction) is str):
                raise TypeError(str(settings))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: wanted {{'max_tokens': int, 'instruction': str}} ({error})") from error
        return settings

    @classmethod
    def fitting(cls, text_encoder) -> "TextSettings":
        """The published Sprint settings, or 32 tokens and no instruction where the encoder has too few positions.

        The instruction and 300 tokens take about 520 positions with Gemma's vocabulary and more with BERT's.
        """
        positions = getattr(getattr(text_encoder, "config", None), "max_position_embeddings", None)
        return cls() if positions is None or positions > 1024 else cls(max_tokens=32, instruction="")

    def save(self, folder: Path | str) -> None:
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class EncodedText(NamedTuple):
    embeds: Tensor  # [B, L, C] token states
    mask: Tensor  # [B, L] int, 1 = token, 0 = padding
    cut: list[str]  # per prompt, the words that did not fit ("" if it all fits)


def normalise(prompt: str) -> str:
    """What the stock pipeline does to a caption (without clean_caption)."""
    return prompt.lower().strip()


def tokenize(tokenizer, prompts: list[str], settings: TextSettings):
    """Ids, mask and character offsets of instruction + prompt, padded and truncated to the stock pipeline's lengths."""
    tokenizer.padding_side = "right"
    length = settings.max_tokens
    if settings.instruction:
        length += len(tokenizer.encode(settings.instruction)) - 2
    return tokenizer(
        [settings.instruction + normalise(p) for p in prompts],
        padding="max_length", max_length=length, truncation=True, add_special_tokens=True,
        return_offsets_mapping=True, return_tensors="pt",
    )  # fmt: skip


def cut_off(tokenizer, prompts: list[str], settings: TextSettings, tokens=None) -> list[str]:
    """For each prompt its end that does not fit in max_tokens, "" if all of it does."""
    tokens = tokens or tokenize(tokenizer, prompts, settings)
    last_character = tokens["offset_mapping"].flatten(1).amax(dim=1).tolist()
    texts = [settings.instruction + normalise(p) for p in prompts]
    return [text[last:].strip() for text, last in zip(texts, last_character)]


def token_states(tokenizer, text_encoder, prompts: list[str], settings: TextSettings) -> EncodedText:
    """Token states of the first token and of the last max_tokens - 1 after the instruction, as in SANA section 3.1.

    Differentiable: training tunes the text encoder through it. Everything else calls encode_text.
    """
    tokens = tokenize(tokenizer, prompts, settings)
    length, positions = tokens.input_ids.shape[1], text_encoder.config.max_position_embeddings
    if length > positions:
        raise ValueError(
            f"instruction and prompt take {length} tokens, the text encoder has {positions} positions: lower "
            f"max_tokens or empty the instruction in the model folder's {SETTINGS_FILE}"
        )
    ids, mask = (tokens[k].to(text_encoder.device) for k in ("input_ids", "attention_mask"))
    states = text_encoder(ids, attention_mask=mask)[0]                                     # [B, all, C]
    keep = [0, *range(1 - settings.max_tokens, 0)]
    return EncodedText(states[:, keep], mask[:, keep], cut_off(tokenizer, prompts, settings, tokens))


@torch.no_grad()
def encode_text(tokenizer, text_encoder, prompts: list[str], settings: TextSettings) -> EncodedText:
    """token_states without gradients."""
    return token_states(tokenizer, text_encoder, prompts, settings)


class LRU:
    """The last max_items results by key; safe to share between threads."""

    def __init__(self, max_items: int):
        self.max_items = max_items
        self.items: OrderedDict[Hashable, Any] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The stored value, or make() stored; two threads that miss at once may both make it, one result stays."""
        with self.lock:
            if key in self.items:
                self.items.move_to_end(key)
                return self.items[key]
        value = make()
        with self.lock:
            value = self.items.setdefault(key, value)
            self.items.move_to_end(key)
            while len(self.items) > self.max_items:
                self.items.popitem(last=False)
        return value

    def clear(self) -> None:
        with self.lock:
            self.items.clear()
