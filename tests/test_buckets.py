"""Buckets and augmentation: shapes near the pictures' own, one shape a batch, and picture, lines and boxes that stay on each other."""

import collections
import json

import cv2
import numpy as np
import pytest
import torch

from pictures import open_corpus, picture, write_networks, write_pictures
from training.config import Config
from training.data.buckets import PUBLISHED, bucket_table, nearest
from training.data.cache import Reading, pixel_sets
from training.data.frames import Frame, may_flip, variants
from training.data.shards import encode_png
from training.loop import Draws
from training.teacher import train_teacher

SHAPES = [(32, 32), (32, 64), (64, 32), (40, 33)]  # of picture i: SHAPES[i % 4]; the last one is nearest to the square


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return write_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"), 24, lambda i: SHAPES[i % 4], toned=lambda i: i % 3 == 0)


# ---- buckets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_px, multiple", [(512, 32), (1024, 32), (2048, 32), (4096, 32), (512, 64), (256, 32), (64, 8), (32, 8)])
def test_buckets_divide_and_have_about_the_same_area(size_px, multiple):
    table = bucket_table(size_px, multiple)
    assert (size_px, size_px) in table.values() and len(table) >= 3
    for ratio, (height, width) in table.items():
        assert height % multiple == width % multiple == 0
        assert 0.75 < height * width / size_px ** 2 < 1.3
        assert float(ratio) == pytest.approx(height / width, abs=1e-5)


def test_the_published_tables_are_used_where_they_fit():
    for size_px in (512, 1024, 2048, 4096):
        assert set(bucket_table(size_px, 32).values()) == {(int(h), int(w)) for h, w in PUBLISHED[size_px].values()}
    assert nearest((768, 1344, 3), bucket_table(1024, 32)) == (768, 1344)
    assert nearest((4000, 6000), bucket_table(1024, 32)) == (832, 1216)  # 2:3


def test_a_size_that_no_bucket_fits_is_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        bucket_table(1000, 32)


def test_pictures_lie_in_the_bucket_of_their_shape_and_a_batch_has_one_shape(tmp_path, networks, data):
    corpus = open_corpus(networks, tmp_path, data, buckets=True, caption_dropout=0.0)
    where = {key: shelf.pixels.images.shape[1:3] for shelf in corpus.shelves for key in shelf.pixels.keys}
    assert len(where) == 24 and [shelf.pixels.images.shape[1:3] for shelf in corpus.shelves][0] == (32, 32)
    table = bucket_table(32, 8)
    for i in range(24):
        assert where[f"p{i:03d}"] == nearest(SHAPES[i % 4], table)
    assert where["p001"][1] >= 1.5 * where["p001"][0] and where["p002"][0] >= 1.5 * where["p002"][1]
    for step in range(12):
        batch, again = corpus.draw(4, Draws(0, step)), corpus.draw(4, Draws(0, step))
        shelf = corpus.shelves[batch.shelf]
        assert torch.equal(batch.x0, again.x0) and batch.captions == again.captions
        height, width = shelf.pixels.images.shape[1:3]
        assert batch.x0.shape == (4, 8, height // 8, width // 8) == batch.cond.shape and batch.weight.shape == (4, 1, height // 8, width // 8)
        assert corpus.pictures(batch).shape == (4, 3, height, width)
        for row, caption in zip(batch.rows, batch.captions):  # the captions are the pictures' own
            assert shelf.pixels.captions[row] == [caption] and shelf.pixels.keys[row] == f"p{int(caption.split()[-1]):03d}"
    assert {corpus.draw(1, Draws(0, step)).shelf for step in range(60)} == set(range(len(corpus.shelves)))


def test_every_picture_is_drawn_with_its_weight(tmp_path, networks, data):
    corpus = open_corpus(networks, tmp_path, data, buckets=True, caption_dropout=0.0, toned_weight=0.25)
    counts, steps, per_step = collections.Counter(), 400, 16
    for step in range(steps):
        counts.update(corpus.draw(per_step, Draws(3, step)).captions)
    weight = lambda i: 0.25 if i % 3 == 0 else 1.0
    total = sum(weight(i) for i in range(24))
    toned = sum(counts[f"the cat {i}"] for i in range(0, 24, 3)) / (steps * per_step)
    assert toned == pytest.approx(8 * 0.25 / total, abs=0.03)
    wide = sum(counts[f"the cat {i}"] for i in range(1, 24, 4)) / (steps * per_step)
    # a whole step is wide or is not: 400 draws with p = 0.25 have a standard error of 0.022
    assert wide == pytest.approx(sum(weight(i) for i in range(1, 24, 4)) / total, abs=0.07)


def test_without_buckets_pictures_are_square_and_drawn_as_ever(tmp_path, networks, data):
    corpus = open_corpus(networks, tmp_path, data, toned_weight=0.25)
    assert len(corpus.shelves) == 1 and corpus.pixels.images.shape == (24, 32, 32, 3)
    # the first version's lines, number by number
    weights = np.array([0.25 if m.get("toned") else 1.0 for m in corpus.pixels.meta])
    cumulative, rng = np.cumsum(weights / weights.sum()), Draws(5, 9).numpy
    rows = np.minimum(np.searchsorted(cumulative, rng.random(16)), 23)
    first = corpus.pixels.first_ink
    inks = np.array([rng.integers(first[r], first[r + 1]) for r in rows])
    captions = [str(rng.choice(corpus.pixels.captions[r])) if rng.random() >= 0.1 else "" for r in rows]
    batch = corpus.draw(16, Draws(5, 9))
    assert list(batch.rows) == list(rows) and batch.captions == captions and torch.equal(batch.weight, torch.ones_like(batch.weight))
    np.testing.assert_array_equal(batch.cond.numpy(), corpus.latents.conds[inks].astype(np.float32))


def test_the_teacher_trains_on_buckets(tmp_path, networks, data):
    config = Config(data=str(data), vae=str(networks / "vae"), text_encoder=str(networks), size_px=32, precision="fp32", encode_batch=8, buckets=True, augment=1,
                    heads=2, cross_heads=2, layers=2, teacher_steps=3, teacher_batch=4, micro_batches=2, preview_steps=0, tracker="none")
    train_teacher(config, tmp_path)
    assert (tmp_path / "teacher" / "transformer" / "config.json").exists()


# ---- frames -------------------------------------------------------------------------------------------------------


def frames(height, width, count=12):
    return [Frame(height, width), *variants(Frame(height, width), count, 0.85, "key", True)]


@pytest.mark.parametrize("source", [(96, 96), (80, 130), (150, 90)])
@pytest.mark.parametrize("target", [(32, 32), (24, 40), (96, 96)])
def test_picture_lines_and_boxes_stay_on_each_other(source, target):
    """A dark figure, the drawing of it, and its box go through each frame; afterwards they still lie in one place."""
    ink, x, y = np.zeros(source, np.uint8), source[1] // 2, source[0] // 2
    ink[y - 10:y + 6, x - 6:x + 14] = 255
    image = np.repeat(255 - ink[..., None], 3, 2)
    region = {"box": [x - 6, y - 10, x + 14, y + 6], "kind": "face"}
    for frame in frames(*target):
        seen, lines = 255 - frame.picture(image)[..., 0].astype(int), frame.ink(ink).astype(int)
        assert seen.shape == lines.shape == target
        ys, xs = np.nonzero(seen > 127)
        line_ys, line_xs = np.nonzero(lines > 127)
        # lines come out thicker by their gain, up to a pixel on one side: half a pixel in the mean, and the ragged edge
        assert abs(ys.mean() - line_ys.mean()) < 0.6 and abs(xs.mean() - line_xs.mean()) < 0.6
        x0, y0, x1, y1 = np.array(frame.regions([region], source)[0]["box"]) * [target[1], target[0], target[1], target[0]]
        np.testing.assert_allclose([x0, y0, x1, y1], [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1)
    assert {f.flip for f in frames(*target)} == {True, False}


def test_a_mirrored_frame_is_the_mirrored_picture():
    image = picture(3, 40, 56)
    for plain in frames(24, 40, 4):
        plain = Frame(24, 40, plain.zoom, plain.top, plain.left, False)
        mirrored = Frame(24, 40, plain.zoom, plain.top, plain.left, True)
        assert np.abs(mirrored.picture(image).astype(int) - plain.picture(image)[:, ::-1]).max() <= 1
        assert mirrored.rect(image.shape) == plain.rect(image.shape)


def test_the_square_frame_is_the_centre_crop_of_old():
    for shape in ((32, 32), (33, 48), (51, 30), (200, 131)):
        image, side = picture(1, *shape), min(shape)
        top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
        wanted = image[top:top + side, left:left + side]
        if side != 32:
            wanted = cv2.resize(wanted, (32, 32), interpolation=cv2.INTER_AREA if side > 32 else cv2.INTER_CUBIC)
        np.testing.assert_array_equal(Frame(32, 32).picture(image), wanted)


def test_a_box_that_is_cropped_away_goes():
    frame = Frame(32, 32, 0.5, 0.0, 0.0)  # the upper left quarter
    assert frame.regions([{"box": [40, 40, 60, 60]}], (64, 64)) == []
    assert frame.regions([{"box": [24, 0, 40, 16]}], (64, 64))[0]["box"] == [0.75, 0.0, 1.0, 0.5]


@pytest.mark.parametrize("caption, wanted", [("a red apple", True), ("a cat to the left of a dog", False), ("a shop SIGN at night", False), ('a shirt saying "hello"', False),
                                             ("a brightly lit room", True), ("the leftovers of a meal", True), ("eight o’clock", False), ("a poster of a band", False)])
def test_what_has_a_side_or_writing_is_not_mirrored(caption, wanted):
    assert may_flip(["something", caption], {}) is wanted
    assert not may_flip(["a red apple"], {"flip": False})


# ---- augmented rows -----------------------------------------------------------------------------------------------


def test_variants_are_further_rows_of_the_training_pictures(tmp_path, networks):
    write_pictures(tmp_path / "data", 6, (48, 48), caption=lambda i: f"cat {i}" if i % 2 else f"a sign {i}")
    lines = {i: 255 - picture(i, 48, 48).min(-1) for i in range(6)}
    for i, ink in lines.items():
        (tmp_path / "data" / f"p{i:03d}.lines.png").write_bytes(encode_png(ink))
    corpus, held_out = (open_corpus(networks, tmp_path / "out", tmp_path / "data", split, augment=3) for split in ("train", "val"))
    pixels = corpus.pixels
    assert len(pixels.meta) == 24 and len(held_out.pixels.meta) == 6 and len(corpus.latents.conds) == 24
    assert pixels.keys == [f"p{i:03d}" for i in range(6) for _ in range(4)]
    for row in range(24):
        # the lines were made of the picture's darkness, and still fit it after crop and flip
        dark, ink = 255 - pixels.images[row].min(-1).astype(int), pixels.inks[pixels.first_ink[row]].astype(int)
        assert np.corrcoef(dark.ravel() > 40, ink.ravel() > 80)[0, 1] > 0.9
        if row % 4:
            assert not np.array_equal(pixels.images[row], pixels.images[row - row % 4])
    again = pixel_sets(str(tmp_path / "data"), "train", 32, tmp_path / "elsewhere", reading=Reading(augment=3))[0]
    np.testing.assert_array_equal(again.images[:], pixels.images[:])


def test_regions_follow_their_picture_into_its_variants(tmp_path):
    box = [10, 12, 30, 24]
    image = np.full((48, 64, 3), 255, np.uint8)
    image[box[1]:box[3], box[0]:box[2]] = (200, 0, 0)
    (tmp_path / "a.png").write_bytes(encode_png(image))
    (tmp_path / "a.txt").write_text("a red box\n")  # the caption may stand in NAME.txt, and the boxes in NAME.json
    (tmp_path / "a.json").write_text(json.dumps({"regions": [{"box": box, "kind": "hand", "weight": 3.0}]}))
    pixels = pixel_sets(str(tmp_path), "train", 48, tmp_path / "cache", reading=Reading(bucket_table(48, 8), 6))[0]
    assert pixels.captions[0] == ["a red box"] and len(pixels.regions) == 7
    height, width = pixels.images.shape[1:3]
    for image, found in zip(pixels.images, pixels.regions):
        ys, xs = np.nonzero(image[..., 1] < 128)
        x0, y0, x1, y1 = np.array(found[0]["box"]) * [width, height, width, height]
        assert found[0]["weight"] == 3.0 and np.allclose([x0, y0, x1, y1], [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.1)
