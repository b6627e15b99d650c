"""Prompts: equal to the stock pipeline for both encoders, what is cut off is said, and the cache keeps the newest."""

import json
import threading

import pytest
import torch
from diffusers import SanaSprintPipeline
from layouts import tiny_bert, tiny_gemma, tiny_transformer, tiny_vae
from torch.testing import assert_close

from sana_app.model.text import LRU, SANA_INSTRUCTION, TextSettings, cut_off, encode_text

BERT_SETTINGS = TextSettings(max_tokens=32, instruction="")
# the tiny tokenizer has one token a letter, so that the full instruction of 250 words would be 1,500 tokens
SHORT_INSTRUCTION = TextSettings(max_tokens=40, instruction="Improve the prompt:\nUser Prompt: ")
PROMPTS = ["A Red apple ", "cat", ""]


@pytest.mark.parametrize("parts, settings", [
    (tiny_bert, BERT_SETTINGS), (tiny_gemma, SHORT_INSTRUCTION), (tiny_gemma, TextSettings()),
])  # fmt: skip
def test_equals_the_stock_pipeline(parts, settings):
    tokenizer, encoder = parts()
    stock = SanaSprintPipeline(tokenizer, encoder, tiny_vae(), tiny_transformer(), None)
    instruction = settings.instruction.split("\n") if settings.instruction else None
    with torch.no_grad():
        embeds, mask = stock.encode_prompt(
            PROMPTS, max_sequence_length=settings.max_tokens, complex_human_instruction=instruction
        )
    ours = encode_text(tokenizer, encoder, PROMPTS, settings)
    assert_close(ours.mask, mask, rtol=0, atol=0)
    assert_close(ours.embeds, embeds, rtol=0, atol=0)
    assert ours.embeds.shape == (3, settings.max_tokens, encoder.config.hidden_size)
    assert ours.cut == ["", "", ""]


@pytest.mark.parametrize("parts, settings", [(tiny_bert, BERT_SETTINGS), (tiny_gemma, SHORT_INSTRUCTION)])
def test_long_prompt_is_cut_and_the_rest_is_reported(parts, settings):
    tokenizer, encoder = parts()
    kept, lost = "a red apple with a cat", "and a dog in the house"
    prompt = kept + " " + "of " * 40 + lost
    text = encode_text(tokenizer, encoder, [prompt, kept[:20]], settings)
    assert text.cut[0].endswith(lost) and prompt.endswith(text.cut[0]) and text.cut[1] == ""
    assert cut_off(tokenizer, [prompt], settings) == text.cut[:1]
    shorter = prompt[: len(prompt) - len(text.cut[0])]
    assert cut_off(tokenizer, [shorter], settings) == [""], "what is kept fits"


def test_settings_come_from_the_folder(tmp_path):
    settings = TextSettings(max_tokens=7, instruction="draw: ")
    settings.save(tmp_path)
    assert TextSettings.of_folder(tmp_path, tiny_bert()[1]) == settings
    assert json.loads((tmp_path / "prompt.json").read_text()) == {"max_tokens": 7, "instruction": "draw: "}


def test_without_a_file_the_encoders_positions_decide(tmp_path):
    assert TextSettings.of_folder(tmp_path, tiny_bert()[1]) == BERT_SETTINGS
    assert TextSettings.of_folder(tmp_path, tiny_gemma()[1]) == TextSettings(300, SANA_INSTRUCTION)


@pytest.mark.parametrize("content", ["{", "[]", '{"max_tokens": "many"}', '{"tokens": 3}', '{"max_tokens": 0}'])
def test_a_damaged_settings_file_is_refused(tmp_path, content):
    (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(ValueError, match="prompt.json"):
        TextSettings.of_folder(tmp_path)


def test_too_many_tokens_for_the_encoder_are_refused():
    with pytest.raises(ValueError, match="512 positions"):
        encode_text(*tiny_bert(), ["cat"], TextSettings())


def test_cache_makes_each_value_once_and_forgets_the_oldest():
    made = []
    cache = LRU(2)

    def get(key):
        return cache.get(key, lambda: made.append(key) or key.upper())

    assert [get(k) for k in "abab"] == list("ABAB") and made == ["a", "b"]
    get("c")  # a is the oldest
    assert get("b") == "B" and made == ["a", "b", "c"]
    assert get("a") == "A" and made == ["a", "b", "c", "a"]
    cache.clear()
    assert get("a") == "A" and len(made) == 5


def test_cache_is_shared_by_threads():
    cache, results = LRU(4), []

    def work():
        results.extend(cache.get(i % 6, lambda: i % 6) == i % 6 for i in range(500))

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 4000 and all(results) and len(cache.items) == 4
