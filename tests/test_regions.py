"""Loss weights for parts of a picture: what a box does to the loss, where boxes come from, and that broken ones are named."""

import json

import numpy as np
import pytest
import torch

from pictures import open_corpus, write_networks, write_pictures
from training.flow import flow_loss
from training.loop import Draws
from training.regions import check_regions, faces, load_detector, weight_map


def whole_pictures(image: np.ndarray) -> list[dict]:
    """A detector that finds a hand in the left half of every picture."""
    return [{"box": [0, 0, image.shape[1] / 2, image.shape[0]], "kind": "hand", "weight": 3.0}]


def test_a_box_weighs_more_and_the_picture_as_a_whole_does_not():
    found = weight_map([{"box": [0.25, 0.5, 0.75, 1.0], "weight": 3.0}], 4, 8, 2.0)
    inside = np.zeros((4, 8), bool)
    inside[2:, 2:6] = True
    assert found.mean() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found[inside] / found[0, 0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(found[~inside], found[0, 0])


def test_a_cell_that_is_covered_in_part_weighs_by_that_part():
    found = weight_map([{"box": [0.0, 0.0, 0.375, 0.125]}], 4, 4, 3.0)  # 1.5 cells wide, half a cell high
    np.testing.assert_allclose(found[0] / found[3, 3], [2.0, 1.5, 1.0, 1.0], rtol=1e-6)
    tiny = weight_map([{"box": [0.51, 0.51, 0.52, 0.52]}], 4, 4, 3.0)  # far smaller than a cell, and still there
    assert tiny[2, 2] > tiny[0, 0]


def test_overlapping_boxes_do_not_multiply_and_a_weight_below_one_turns_down():
    both = weight_map([{"box": [0, 0, 0.5, 1], "weight": 2.0}, {"box": [0, 0, 0.5, 1], "weight": 4.0}], 2, 2, 2.0)
    assert both[0, 0] / both[0, 1] == pytest.approx(4)
    down = weight_map([{"box": [0, 0, 0.5, 1], "weight": 0.0}], 2, 2, 2.0)
    assert down[0, 0] == 0 and down[0, 1] == 2
    np.testing.assert_array_equal(weight_map([{"box": [0, 0, 1, 1], "weight": 0.0}], 2, 2, 2.0), np.ones((2, 2)))  # nothing would be left
    np.testing.assert_array_equal(weight_map([], 3, 5, 2.0), np.ones((3, 5)))


def test_the_loss_counts_an_error_inside_a_box_more():
    g = torch.Generator().manual_seed(0)
    v, x0, z = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(3))
    assert torch.equal(flow_loss(v, x0, z, torch.ones(2, 1, 4, 4)), flow_loss(v, x0, z))
    weight = torch.from_numpy(np.stack([weight_map([{"box": [0, 0, 0.5, 0.5]}], 4, 4, 3.0), np.ones((4, 4), np.float32)]))[:, None]
    target = z - x0
    inside, outside = target.clone(), target.clone()
    inside[:, :, 0, 0] += 1
    outside[:, :, 3, 3] += 1
    ratio = flow_loss(inside, x0, z, weight) / flow_loss(outside, x0, z, weight)
    torch.testing.assert_close(ratio, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(flow_loss(target + 1, x0, z, weight), torch.ones(2))  # an error everywhere counts as ever


@pytest.mark.parametrize("bad", [{"box": [0, 0, 1, 1]}, [{"box": [0, 0, 1]}], [{"box": [4, 0, 2, 9]}], [{"kind": "face"}], ["face"], [{"box": [0, 0, 1, "x"]}],
                                 [{"box": [0, 0, 1, 1], "weight": -1}], [{"box": [0, 0, 1, float("nan")]}]])
def test_a_broken_box_is_named(bad):
    with pytest.raises(ValueError, match="a.json.*(box|list)"):
        check_regions(bad, "a.json")


@pytest.mark.parametrize("bad", ["faces", "training.regions:nobody", "no.such.module:faces", "training.regions:Detector2"])
def test_a_detector_that_is_not_there_is_named(bad):
    with pytest.raises(ValueError, match="region_detector"):
        load_detector(bad)


def test_faces_are_found_without_a_download():
    data = pytest.importorskip("skimage.data")
    found = check_regions(faces(data.astronaut()), "astronaut")
    assert len(found) == 1 and found[0]["kind"] == "face"
    x0, y0, x1, y1 = found[0]["box"]
    assert x0 < 205 and x1 > 245 and y0 < 90 and y1 > 150  # eyes to chin
    assert faces(data.coffee()) == []


def test_boxes_and_detectors_reach_the_batch(tmp_path):
    networks = write_networks(tmp_path / "networks")
    data = write_pictures(tmp_path / "data", 6)
    for i in range(2):  # two pictures bring boxes of their own: the upper half, with the recipe's weight
        (data / f"p{i:03d}.json").write_text(json.dumps({"caption": f"the cat {i}", "regions": [{"box": [0, 0, 32, 16], "kind": "face"}]}))
    plain = open_corpus(networks, tmp_path / "out", data, region_weight=5.0)
    detected = open_corpus(networks, tmp_path / "out", data, region_weight=5.0, region_detector="test_regions:whole_pictures")
    ratios = lambda w: (round(float(w[0, 0, 3] / w[0, 3, 3]), 4), round(float(w[0, 3, 0] / w[0, 3, 3]), 4))
    for corpus, wanted in ((plain, (1.0, 1.0)), (detected, (1.0, 3.0))):
        batch = corpus.draw(24, Draws(0, 0))
        assert set(batch.rows) == set(range(6)) and batch.weight.shape == (24, 1, 4, 4)
        torch.testing.assert_close(batch.weight.mean(dim=(1, 2, 3)), torch.ones(24))
        for row, weight in zip(batch.rows, batch.weight):
            assert ratios(weight) == ((5.0, 1.0) if row < 2 else wanted)
