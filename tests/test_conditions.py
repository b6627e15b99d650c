"""What a ControlNet can follow: each kind of condition, from the picture to the cached latent."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from layouts import build_base_folder
from pictures import open_corpus, write_networks, write_pictures

from training.base import with_base
from training.batches import Corpus
from training import conditions
from training.conditions import CONDITIONS, DETECTOR_WEIGHTS, canny, check_condition, condition_key, condition_maker, write_condition
from training.config import Config
from training.data.cache import fit, pixel_cache
from training.data.shards import Sample, ShardWriter, read_samples

SAMPLE = Path(__file__).parent.parent / "assets" / "sample"


def figure(size: int = 64, dim: float = 1.0) -> np.ndarray:
    """A red disc on grey, uint8 [size, size, 3]; `dim` scales its contrast."""
    image = np.full((size, size, 3), 128, np.uint8)
    cv2.circle(image, (size // 2, size // 2), size // 4, tuple(int(128 + dim * (c - 128)) for c in (230, 20, 20)), -1)
    return image


def sample_of(image: np.ndarray, conds: list[np.ndarray] = ()) -> Sample:
    return Sample("a", image, [], ["a disc"], {}, list(conds))


def made(kind: str, sample: Sample, size: int = 64, weights: str = "") -> list[np.ndarray]:
    return condition_maker(kind, weights)(sample, fit(sample.image, size), lambda raster: fit(raster, size))


@pytest.mark.parametrize("dim", [1.0, 0.4])
def test_canny_draws_the_outline_whatever_the_contrast(dim):
    edges = canny(figure(dim=dim))
    assert edges.shape == (64, 64) and set(np.unique(edges)) == {0, 255}
    ys, xs = np.nonzero(edges)
    radius = np.hypot(ys - 32, xs - 32)
    assert len(radius) > 60 and np.abs(radius - 16).max() < 3


def test_canny_takes_faint_grain_for_paper():
    grain = np.random.default_rng(0).integers(124, 132, (64, 64, 3)).astype(np.uint8)
    assert not canny(grain).any() and not canny(np.full((64, 64, 3), 128, np.uint8)).any()


def test_canny_is_a_function_of_the_picture_alone():
    assert np.array_equal(*(made("canny", sample_of(figure(100)))[0] for _ in range(2)))
    assert made("canny", sample_of(figure(100)))[0].shape == (64, 64)


def test_own_conditions_keep_their_colours_and_lie_on_their_pictures():
    cond = np.zeros((100, 140, 3), np.uint8)
    cond[:, 20:70] = (10, 200, 30)  # the left half of the square that the crop keeps
    found = made("own", sample_of(np.zeros((100, 140, 3), np.uint8), [cond]), 50)
    assert found[0].shape == (50, 50, 3)
    assert (found[0][:, 2:22] == (10, 200, 30)).all() and not found[0][:, 28:].any()


def test_own_conditions_that_are_missing_or_of_another_size_are_named():
    with pytest.raises(ValueError, match="a.cond.png"):
        made("own", sample_of(figure()))
    with pytest.raises(ValueError, match="32x32, its picture 64x64"):
        made("own", sample_of(figure(), [figure(32)]))


def test_own_conditions_are_read_from_folders_and_shards(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), figure()[..., ::-1])
    cv2.imwrite(str(folder / "a.cond.png"), figure(dim=0.5)[..., ::-1])
    (folder / "a.txt").write_text("a disc")
    sample = next(read_samples(folder))
    assert np.array_equal(sample.conds[0], figure(dim=0.5)) and not sample.lines
    writer = ShardWriter(tmp_path / "shards", "train")
    writer.write(sample)
    writer.close()
    assert np.array_equal(next(read_samples(tmp_path / "shards")).conds[0], sample.conds[0])


def test_an_unknown_condition_is_refused():
    with pytest.raises(ValueError, match="lines, canny, hed, depth, own"):
        condition_maker("sketchy")
    assert condition_maker("lines") is None and len(CONDITIONS) == 5


def test_hed_comes_from_a_folder_of_weights(tmp_path):
    from controlnet_aux.hed import ControlNetHED_Apache2
    torch.manual_seed(0)
    torch.save(ControlNetHED_Apache2().state_dict(), tmp_path / "ControlNetHED.pth")
    found = made("hed", sample_of(figure(96)), 96, str(tmp_path))[0]
    assert found.shape == (96, 96) and found.dtype == np.uint8 and len(np.unique(found)) > 1


@pytest.mark.parametrize("kind", ["hed", "depth"])
def test_a_network_that_cannot_be_had_is_named_with_a_way_out(kind, tmp_path):
    maker = condition_maker(kind)  # asks for nothing yet: a finished cache needs no network
    with pytest.raises(ValueError, match="could not be had from lllyasviel/Annotators.*canny needs no network"):
        maker(sample_of(figure()), figure(), lambda raster: raster)  # the tests are offline
    with pytest.raises(ValueError, match="could not be had from .*own takes conditions"):
        made(kind, sample_of(figure()), weights=str(tmp_path))


def test_without_controlnet_aux_canny_works_and_hed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    assert made("canny", sample_of(figure()))[0].any()
    with pytest.raises(ValueError, match="pip install --no-deps controlnet-aux"):
        made("hed", sample_of(figure()))


def test_conditions_reach_the_batch_as_latents(tmp_path):
    """Canny in one channel, own pictures in colour: what the batch holds is their encoding by the base's autoencoder."""
    base = build_base_folder(tmp_path / "base", gemma=False)
    data = tmp_path / "data"
    data.mkdir()
    for i, sample in zip(range(6), read_samples(SAMPLE, "train")):
        image = fit(sample.image, 32)
        cv2.imwrite(str(data / f"{i}.png"), image[..., ::-1])
        cv2.imwrite(str(data / f"{i}.cond.png"), 255 - image[..., ::-1])
        (data / f"{i}.txt").write_text("a thing")
    for kind in ("own", "canny"):
        config = with_base(Config(data=str(data), base=str(base), size_px=32, precision="fp32", condition=kind), tmp_path)
        corpus = Corpus(config, tmp_path / "out", "train")
        batch = corpus.fixed(6)
        rasters = np.stack([made(kind, s, 32)[0] for s in read_samples(data)])
        x = torch.from_numpy(rasters).float() / 127.5 - 1
        x = x.permute(0, 3, 1, 2) if kind == "own" else x[:, None].expand(-1, 3, -1, -1)
        with torch.no_grad():
            wanted = corpus.vae.encode(x.contiguous()).latent * corpus.vae.config.scaling_factor
        torch.testing.assert_close(batch.cond, wanted, atol=5e-3, rtol=5e-3)  # the cache is half precision
        assert corpus.drawings(batch).shape == (6, 3, 32, 32)


# ---- which network, and which ControlNet ------------------------------------------------------------------------------


def test_another_network_makes_other_rasters_and_no_other_cache_is_renamed(tmp_path, monkeypatch):
    """The old rasters were used again, whatever network was named."""
    networks, data = write_networks(tmp_path / "networks"), write_pictures(tmp_path / "data", 3)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ControlNetHED.pth").write_bytes(name.encode())
    level, loaded = {"": 10, str(tmp_path / "one"): 100, str(tmp_path / "two"): 200}, []

    def load(kind, weights):
        loaded.append(weights)
        return lambda image: np.full(image.shape[:2], level[weights], np.uint8)
    monkeypatch.setattr(conditions, "load_detector", load)
    opened = lambda weights: open_corpus(networks, tmp_path / "out", data, condition="hed", condition_weights=weights)
    for weights in level:
        assert (opened(weights).pixels.inks[:] == level[weights]).all()
    (tmp_path / "one").rename(tmp_path / "moved")
    assert (opened(str(tmp_path / "moved")).pixels.inks[:] == 100).all() and len(loaded) == 3  # known by its content
    assert condition_key("hed") == condition_key("hed", DETECTOR_WEIGHTS) == "hed" and condition_key("depth", "a/b") == "depth a/b"
    assert [condition_key(kind, str(tmp_path / "two")) for kind in ("lines", "canny", "own")] == ["lines", "canny", "own"]


def test_the_cache_of_line_drawings_keeps_its_name(tmp_path):
    """Run folders and the shipped model name their data by it."""
    assert pixel_cache(SAMPLE, "train", 64, tmp_path).hash == "82805937154d1507"


def test_a_controlnet_says_what_it_follows_and_one_that_does_not_is_taken_as_it_is(tmp_path):
    check_condition(tmp_path, "depth")
    write_condition(tmp_path, "canny")
    check_condition(tmp_path, "canny")
    with pytest.raises(ValueError, match="condition=lines, but the ControlNet at .* follows canny: --set condition=canny"):
        check_condition(tmp_path, "lines")
    (tmp_path / "condition.json").write_text("{")
    with pytest.raises(ValueError, match="condition.json is not readable JSON"):
        check_condition(tmp_path, "canny")
