"""The balance report: what captions name is counted, and the weights even it out where that can be done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pictures import open_corpus, write_networks, write_pictures, write_shards
from training.balance import ATTRIBUTES, CAP, by_name, even_weights, load_weights, parse_attributes, read, tell
from training.loop import Draws

ROOT = Path(__file__).parent.parent
WORDS = {"colour": ["red", "blue", "grey|gray"], "style": ["flat", "3d"]}


def test_words_and_phrases_are_counted_once_a_picture():
    captions = [["a red apple", "red, flat style"], ["a Gray cat"], ["a bored cat, 3d"], ["blue and red"], [""]]
    found = tell(captions, WORDS)
    assert found["colour"].tolist() == [[True, False, False], [False, False, True], [False] * 3, [True, True, False], [False] * 3]
    assert found["style"].tolist() == [[True, False], [False, False], [False, True], [False, False], [False, False]]


def test_a_longer_phrase_hides_the_shorter_one_and_a_word_may_mean_two_things():
    found = tell([["a hand, medium-dark skin tone"], ["a woman with dark skin"], ["two boys"], ["a manly cat"]], ATTRIBUTES)
    value = lambda attribute, word: next(i for i, v in enumerate(ATTRIBUTES[attribute]) if word in v.split("|"))
    assert found["skin"][0].nonzero()[0].tolist() == [value("skin", "medium-dark skin")]
    assert found["skin"][1].nonzero()[0].tolist() == [value("skin", "dark skin")]
    assert found["gender"][:, value("gender", "man")].tolist() == [False, False, True, False] and found["gender"][1, value("gender", "woman")]
    assert found["age"][2].nonzero()[0].tolist() == [value("age", "child")]


def population(count=600, seed=0):
    """Two attributes, uneven and dependent on each other; a fifth of the pictures names nothing."""
    rng = np.random.default_rng(seed)
    captions = []
    for _ in range(count):
        colour = rng.choice(["red", "blue", "gray"], p=[0.7, 0.2, 0.1])
        style = rng.choice(["flat", "3d"], p=[0.9, 0.1] if colour == "red" else [0.5, 0.5])
        captions.append([f"a {colour} cat, {style}"] if rng.random() > 0.2 else ["a cat"])
    return captions


def test_resampled_captions_are_even():
    captions = population()
    tables = tell(captions, WORDS)
    weights = even_weights(tables)
    assert weights.mean() == pytest.approx(1) and weights.min() > 1 / CAP / 2 and weights.max() < 2 * CAP
    for table in tables.values():
        totals = weights @ table
        np.testing.assert_allclose(totals / totals.mean(), 1, atol=0.01)
    drawn = np.random.default_rng(1).choice(len(captions), 20000, p=weights / weights.sum())
    for name, table in tables.items():
        before, after = table.mean(0) / table.mean(0).sum(), table[drawn].mean(0) / table[drawn].mean(0).sum()
        assert np.abs(before - 1 / len(before)).max() > 0.2
        np.testing.assert_allclose(after, 1 / len(after), atol=0.02, err_msg=name)


def test_even_captions_keep_equal_weights_and_too_rare_ones_are_capped():
    even = tell([["red"], ["blue"], ["gray"]] * 5, {"colour": WORDS["colour"]})
    np.testing.assert_allclose(even_weights(even), 1, atol=1e-9)
    rare = tell([["red"]] * 1000 + [["blue"]] * 2, {"colour": WORDS["colour"]})
    weights = even_weights(rare)
    assert weights[-1] / weights[0] <= CAP * CAP and weights[-1] > weights[0]


@pytest.mark.parametrize("text", ["colour: red, blue, grey|gray\n# a remark\n\nstyle: flat, 3d\n", json.dumps(WORDS)])
def test_attributes_of_ones_own(text):
    assert parse_attributes(text, "mine") == WORDS


@pytest.mark.parametrize("text, named", [("colour red", "line 1"), ("colour: red\nstyle:", "line 2"), ('{"colour": "red"}', "wanted"), ("{", "not JSON")])
def test_a_broken_attribute_file_is_named(text, named):
    with pytest.raises(ValueError, match=f"mine.*{named}"):
        parse_attributes(text, "mine")


def test_the_command_writes_weights_that_the_training_draws_with(tmp_path):
    networks = write_networks(tmp_path / "networks")
    data = write_pictures(tmp_path / "data", 20, caption=lambda i: "a blue cat" if i % 10 == 0 else "a red cat")
    done = subprocess.run([sys.executable, "-m", "training.balance", "--data", str(data), "--even", "colour", "--least", "2", "--out", str(tmp_path / "b.json")],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "colour: named by 20 of 20 pictures" in done.stdout and "90.0%  ->   50.0%" in done.stdout
    share = {}
    for balance in ("", str(tmp_path / "b.json")):
        corpus = open_corpus(networks, tmp_path / "out", data, balance=balance, caption_dropout=0.0)
        drawn = [c for step in range(20) for c in corpus.draw(64, Draws(0, step)).captions]
        share[bool(balance)] = drawn.count("a blue cat") / len(drawn)
    assert share[False] == pytest.approx(0.1, abs=0.04) and share[True] == pytest.approx(0.5, abs=0.06)
    with pytest.raises(ValueError, match="knows none of the pictures"):
        open_corpus(networks, tmp_path / "out", write_pictures(tmp_path / "other", 3, first=100), balance=str(tmp_path / "b.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="training.balance"):
        open_corpus(networks, tmp_path / "out", data, balance=str(tmp_path / "bad.json"))


def write_weights(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_two_data_sets_with_the_same_names_keep_their_own_weights(tmp_path):
    """Numbered pictures: p000 is a picture of each set, p003 of one only."""
    networks = write_networks(tmp_path / "networks")
    for name, caption, count in (("a", "a red cat", 4), ("b", "a blue cat", 3)):
        write_pictures(tmp_path / name, count, caption=caption)
    data = f"{tmp_path}/a*1,{tmp_path}/b*1"
    names, _ = read(data, "train")
    content = by_name(names, np.arange(1.0, 8.0))
    assert content["weights"] == {"p003": 4.0} and content["sets"][f"{tmp_path}/b"] == {"p000": 5.0, "p001": 6.0, "p002": 7.0}
    corpus = open_corpus(networks, tmp_path / "out", data, balance=write_weights(tmp_path / "b.json", content))
    shares = np.diff(np.concatenate([[0], corpus.shelves[0].cumulative]))
    np.testing.assert_allclose(shares, np.concatenate([np.arange(1, 5) / 10, np.arange(5, 8) / 18]) / 2)
    # one of the two alone, and by another spelling of its path
    relative = os.path.relpath(tmp_path / "b")
    assert load_weights(str(tmp_path / "b.json"), {relative: ["p001"]}) == {relative: {"p001": 6.0}}


def test_a_weight_that_could_be_that_of_several_pictures_is_refused(tmp_path):
    old = write_weights(tmp_path / "old.json", {"data": "a,b", "weights": {"p000": 2.0, "p001": 3.0}})  # as written before data sets were told apart
    assert load_weights(old, {"a": ["p000"], "b": ["p001", "p007"]}) == {"a": {"p000": 2.0}, "b": {"p001": 3.0}}
    with pytest.raises(ValueError, match="one weight for p000, which is a picture of a and another one of b: write it anew"):
        load_weights(old, {"a": ["p000"], "b": ["p001", "p000"]})
    new = write_weights(tmp_path / "new.json", {"weights": {}, "sets": {"a": {"p000": 2.0}, "b": {"p000": 3.0}}})
    with pytest.raises(ValueError, match="weights for p000 of .*a, .*b, but not of c: write it anew"):
        load_weights(new, {"c": ["p000"]})


def test_the_same_name_twice_in_one_data_set_is_refused(tmp_path):
    first, second = (write_shards(tmp_path / name, 2, 2)[0] for name in ("x", "y"))
    second.rename(first.with_name("train-00001.tar"))
    with pytest.raises(ValueError, match="x has 2 samples named p000, in different shards"):
        read(str(tmp_path / "x"), "train")
