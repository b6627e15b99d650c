"""The training data: what a sample is, that it repeats itself, and that nothing held out is ever trained on."""

import json
import logging
import tarfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from sana_app.lines import condition_from_ink, ink_from_rgb, resize_ink
from training.data.captions import HUES, captions, styled, with_colour
from training.data.colour import colour_name, hue_distance, recolour
from training.data.drawing import LEVELS, line_drawing
from training.data.emoji import Item, concept_of, is_held_out, make_sample, plain
from training.data.shards import Sample, ShardWriter, encode_png, read_samples
from training.data.sources import split_name

SAMPLE = Path(__file__).parent.parent / "assets" / "sample"
SVG = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="17" r="12" fill="#d22"/>'
       '<path d="M16 8c0-4 3-6 6-6" stroke="#363" stroke-width="3" fill="none"/></svg>')


def item(key="1f34e_flat_1", **changes):
    code, style, copy = key.split("_")
    about = dict(key=key, concept=code, style=style, source=SVG, label="red apple", tags=("fruit", "healthy", "ripe"), group=4,
                 toned=False, copy=int(copy))
    return Item(**about | changes)


def figure(size=256):
    """A red disc with a blue square in it, over white: picture and alpha."""
    rgb, alpha = np.full((size, size, 3), 255, np.uint8), np.zeros((size, size), np.uint8)
    cv2.circle(rgb, (size // 2, size // 2), int(0.35 * size), (220, 30, 30), -1, cv2.LINE_AA)
    cv2.circle(alpha, (size // 2, size // 2), int(0.35 * size), 255, -1, cv2.LINE_AA)
    a, b = int(0.4 * size), int(0.6 * size)
    cv2.rectangle(rgb, (a, a), (b, b), (30, 60, 220), -1)
    return rgb, alpha


@pytest.fixture(scope="module")
def sample():
    return {split: list(read_samples(SAMPLE, split)) for split in ("train", "val")}


def same(a: Sample, b: Sample) -> bool:
    return (a.key, a.captions, a.meta) == (b.key, b.captions, b.meta) and np.array_equal(a.image, b.image) and all(
        np.array_equal(x, y) for x, y in zip(a.lines, b.lines, strict=True))


# ---- the emoji set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 256])
def test_a_sample_depends_on_its_key_alone(size):
    first = make_sample(item(), size)
    make_sample(item("1f34f_noto_0"), size)  # whatever was made in between
    assert same(first, make_sample(item(), size))
    assert first.image.shape == (size, size, 3) and all(ink.shape == (size, size) for ink in first.lines)
    assert not np.array_equal(first.image, make_sample(item("1f350_flat_1"), size).image)


def test_every_variant_of_a_concept_lies_on_the_same_side_of_the_split():
    codes = ["1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1F44B-FE0F"]
    assert {concept_of(c) for c in codes} == {"1f44b"}
    assert concept_of("1f9d1-1f3fd-200d-1f680") == concept_of("1f9d1-200d-1f680") != concept_of("1f9d1-200d-1f4bb")
    assert plain("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_about_a_twentieth_of_all_concepts_is_held_out():
    held_out = sum(is_held_out(f"{code:x}") for code in range(0x1F300, 0x1F300 + 4000))
    assert 0.04 < held_out / 4000 < 0.06


def test_no_concept_of_the_shipped_sample_is_in_both_splits(sample):
    concepts = {split: {s.meta["concept"] for s in found} for split, found in sample.items()}
    assert concepts["train"] and concepts["val"] and not concepts["train"] & concepts["val"]
    for split, found in sample.items():
        assert all(is_held_out(s.meta["concept"]) == (split == "val") for s in found)
        assert all(concept_of(s.key.split("_")[0]) == s.meta["concept"] for s in found)
    assert all(s.meta["copy"] == 0 for s in sample["val"])  # nothing held out is augmented


def test_the_sample_is_what_its_manifest_says(sample):
    manifest = json.loads((SAMPLE / "manifest.json").read_text())
    assert manifest["samples"] == {split: len(found) for split, found in sample.items()}
    assert sum(p.stat().st_size for p in SAMPLE.iterdir()) < 3e6
    assert {s.meta["style"] for s in sample["train"]} == set(manifest["styles"])
    assert all(s.lines and s.image.shape == (64, 64, 3) for found in sample.values() for s in found)


# ---- captions ---------------------------------------------------------------------------------------------------


def test_captions_are_distinct_and_a_plain_picture_has_one_of_the_style_alone():
    found = captions("red apple", ["fruit", "ripe"], "3d", "red", False, np.random.default_rng(0))
    assert len(found) == len(set(found))
    assert found[0] == "red apple, 3d style" and "a red apple, 3d style" in found and "3d style" in found
    assert any("fruit" in c or "ripe" in c for c in found)


def test_a_recoloured_picture_is_never_called_by_its_old_colour():
    for seed in range(5):
        found = captions("red apple", ["fruit"], "flat", "blue", True, np.random.default_rng(seed))
        assert all("blue" in c and "red" not in c.split() for c in found)


def test_caption_forms():
    assert styled("a cat", None) == "a cat" and styled("", "noto") == "noto style" and styled("", None) == ""
    assert with_colour("green apple", "red") == "red apple"
    assert with_colour("red", "blue") == "blue"


# ---- drawings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [128, 256])
def test_the_outline_of_a_disc_lies_on_its_border(size):
    rgb, alpha = figure(size)
    ys, xs = np.mgrid[:size, :size] - size / 2
    off_border = np.abs(np.hypot(xs, ys) - 0.35 * size)
    for seed in range(6):
        ink = line_drawing(rgb, alpha, np.random.default_rng(seed), "outline")
        # half the widest pen, the trace's two sides, three times the strongest wobble, and the shift
        assert off_border[ink > 127].max() < 14 * size / 256
        assert np.median(off_border[ink > 127]) < 4 * size / 256


def test_a_finer_level_has_more_ink(sample):
    rng = lambda i: np.random.default_rng(i)
    ink = defaultdict(float)
    for i, s in enumerate(sample["train"][:40]):
        picture = cv2.resize(s.image, (256, 256), interpolation=cv2.INTER_CUBIC)
        alpha = np.where(picture.min(-1) < 240, 255, 0).astype(np.uint8)
        for level in LEVELS:
            ink[level] += line_drawing(picture, alpha, rng(i), level).mean()
    assert ink["outline"] < ink["regions"] < ink["full"] and ink["outline"] < ink["strong"] < ink["full"]


def test_two_hands_draw_differently_and_one_hand_twice_the_same():
    rgb, alpha = figure()
    drawings = [line_drawing(rgb, alpha, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawings[0], drawings[1])
    assert not np.array_equal(drawings[0], drawings[2])
    assert all(d.dtype == np.uint8 and d.shape == (256, 256) and 0 < (d > 127).mean() < 0.3 for d in drawings)


def test_an_empty_page_gives_an_empty_drawing():
    blank = np.full((128, 128, 3), 255, np.uint8)
    assert not line_drawing(blank, np.zeros((128, 128), np.uint8), np.random.default_rng(0)).any()


# ---- colours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUES)
def test_recolour_turns_the_hue_to_the_named_one_and_leaves_the_paper_white(name):
    rgb, alpha = figure()
    painted = recolour(rgb, alpha, name)
    hue = cv2.cvtColor(painted.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[128, 60, 0]
    assert hue_distance(hue, HUES[name]) <= 6  # hues are counted in bins of 10 degrees
    assert (painted[alpha == 0] == 255).all()
    other = (slice(110, 146), slice(110, 146))  # the blue square keeps its colour
    assert np.abs(painted[other].astype(int) - rgb[other]).max() <= 2


def test_colour_names_fit_what_was_painted():
    alpha = figure()[1]
    for name, rgb in {"red": (220, 20, 20), "blue": (30, 80, 230), "green": (20, 180, 40), "brown": (120, 60, 20), "black": (20, 20, 20)}.items():
        assert colour_name(np.full((256, 256, 3), rgb, np.uint8), alpha) == name
    stripes = np.zeros((256, 256, 3), np.uint8)
    for i, hue in enumerate(np.linspace(0, 300, 8)):
        stripes[:, i * 32:(i + 1) * 32] = cv2.cvtColor(np.float32([[[hue, 1, 1]]]), cv2.COLOR_HSV2RGB)[0, 0] * 255
    assert colour_name(stripes, np.full((256, 256), 255, np.uint8)) is None


# ---- shards and folders -----------------------------------------------------------------------------------------


def test_shards_give_back_what_was_written_and_the_same_samples_the_same_bytes(tmp_path, sample):
    samples = sample["val"][:5]
    for folder in ("a", "b"):
        writer = ShardWriter(tmp_path / folder, "val", per_shard=2)
        for s in samples:
            writer.write(s)
        writer.close()
    assert [p.name for p in writer.paths] == ["val-00000.tar", "val-00001.tar", "val-00002.tar"]
    assert all((tmp_path / "a" / p.name).read_bytes() == p.read_bytes() for p in writer.paths)
    back = list(read_samples(tmp_path / "a", "val"))
    assert len(back) == 5 and all(same(a, b) for a, b in zip(samples, back))


def test_webdataset_reads_the_shards_too():
    web = pytest.importorskip("webdataset")
    first = next(iter(web.WebDataset(str(SAMPLE / "val-00000.tar"), shardshuffle=False)))
    assert {"png", "json"} <= set(first) and json.loads(first["json"])["captions"]


def write_folder(folder):
    rgb, _ = figure(64)
    (folder / "deep").mkdir(parents=True)
    for name in ("apple", "deep/pear"):
        (folder / f"{name}.png").write_bytes(encode_png(rgb))
        (folder / f"{name}.txt").write_text(f"a {Path(name).name}\nanother caption\n")
    lines = np.full((64, 64), 255, np.uint8)
    lines[30:33, 10:50] = 0
    (folder / "apple.lines.png").write_bytes(encode_png(lines))
    return rgb, lines


def test_a_folder_of_pictures_and_texts_needs_nothing_else(tmp_path):
    rgb, lines = write_folder(tmp_path)
    found = {s.key: s for s in read_samples(tmp_path, "train")}
    assert set(found) == {"apple", "deep/pear"}
    np.testing.assert_array_equal(found["apple"].image, rgb)
    np.testing.assert_array_equal(found["apple"].lines[0], 255 - lines)
    assert found["apple"].captions == ["a apple", "another caption"] and found["deep/pear"].lines == []


def test_a_picture_without_lines_is_drawn_for_training(tmp_path):
    from training.data.cache import pixel_cache

    write_folder(tmp_path / "mine")
    pixels = pixel_cache(tmp_path / "mine", "train", 64, tmp_path / "cache")
    assert pixels.images.shape == (2, 64, 64, 3) and list(pixels.first_ink) == [0, 1, 3]
    assert all((np.asarray(ink) > 127).any() for ink in pixels.inks)


def test_a_broken_file_is_named_skipped_and_counted(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (tmp_path / "torn.txt").write_text("torn")
    with caplog.at_level(logging.WARNING):
        assert len(list(read_samples(tmp_path, "train"))) == 2
    assert "torn.png" in caplog.text and "1 so far" in caplog.text


def test_a_missing_caption_is_named(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / "deep" / "pear.txt").unlink()
    with caplog.at_level(logging.WARNING):
        assert [s.key for s in read_samples(tmp_path, "train")] == ["apple"]
    assert "deep/pear.txt" in caplog.text


def test_a_folder_with_nothing_usable_is_refused_with_what_was_wanted(tmp_path):
    with pytest.raises(ValueError, match="NAME.png"):
        list(read_samples(tmp_path, "train"))
    tarfile.open(tmp_path / "test-00000.tar", "w").close()
    with pytest.raises(ValueError, match="none named train"):
        list(read_samples(tmp_path, "train"))


@pytest.mark.parametrize("name, wanted", [("a/b.lines0.png", ("a/b", ".lines0.png")), ("a.lines.PNG", ("a", ".lines.png")),
                                          ("a/b.v2.png", ("a/b.v2", ".png")), ("x.json", ("x", ".json"))])
def test_names_split_into_key_and_part(name, wanted):
    assert split_name(name) == wanted


# ---- canvas to condition ----------------------------------------------------------------------------------------


def stroke(size=128):
    ink = np.zeros((size, size), np.uint8)
    cv2.circle(ink, (size // 2, size // 2), size // 4, 255, max(1, size // 40), cv2.LINE_AA)
    return ink


def test_the_same_drawing_in_any_polarity_is_the_same_ink():
    ink = stroke()
    on_white, on_black = np.repeat(255 - ink[..., None], 3, 2), np.repeat(ink[..., None], 3, 2)
    transparent = np.dstack([np.zeros_like(on_white), ink])
    for drawing in (on_white, on_black, 255 - ink, transparent):
        np.testing.assert_allclose(ink_from_rgb(drawing).astype(int), ink, atol=1)
    coloured = np.where(ink[..., None] > 127, np.uint8([200, 0, 0]), np.uint8([250, 245, 230]))
    assert ((ink_from_rgb(coloured) > 100) == (ink > 127)).all()


def test_a_blank_page_has_no_ink_whatever_its_colour():
    for value in (0, 128, 255):
        assert not ink_from_rgb(np.full((32, 32, 3), value, np.uint8)).any()


def test_the_condition_has_white_lines_on_black_for_the_model():
    cond = condition_from_ink(stroke(), 128)
    assert cond.shape == (1, 3, 128, 128) and str(cond.dtype) == "torch.float32"
    assert cond.min() == -1 and cond.max() == 1 and cond[0, 0, 0, 0] == -1
    assert (condition_from_ink(np.zeros((300, 200), np.uint8), 64) == -1).all()


@pytest.mark.parametrize("page", [128, 256, 512, 1024])
def test_a_drawing_gives_nearly_the_same_condition_whatever_the_size_of_the_page(page):
    at_home, resized = resize_ink(stroke(128), 128), resize_ink(stroke(page), 128)
    assert resized.shape == (128, 128)
    assert ((at_home > 127) & (resized > 127)).sum() / ((at_home > 127) | (resized > 127)).sum() > 0.6
    assert resized.max() == 255


def test_a_thin_pen_on_a_large_page_does_not_fade():
    ink = np.zeros((512, 512), np.uint8)
    ink[254:256, 50:460] = 255  # 2 px, half a pixel at 128 px
    assert resize_ink(ink, 128)[:, 30:100].max(0).min() == 255


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)])
def test_what_is_no_drawing_is_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        ink_from_rgb(bad)
    with pytest.raises(ValueError, match="uint8"):
        resize_ink(bad, 64)


def test_no_drawing_is_read_inverted():
    # a drawing that fills the frame has ink along the border, a filled one still leaves most of the paper bare
    for split in ("train", "val"):
        for sample in read_samples(SAMPLE, split):
            for ink in sample.lines:
                assert (ink > 127).mean() < 0.5, sample.key
