"""The numbers in a model card are only worth what these functions are."""

import cv2
import numpy as np
import pytest

from training import metrics
from training.data.colour import recolour


def disc(size=256, radius=0.3, dx=0, colour=(220, 30, 30)):
    """A disc on white paper, and the ink of its outline."""
    rgb = np.full((size, size, 3), 255, np.uint8)
    ink = np.zeros((size, size), np.uint8)
    centre, r = (size // 2 + dx, size // 2), int(size * radius)
    cv2.circle(rgb, centre, r, colour, -1, cv2.LINE_AA)
    cv2.circle(ink, centre, r, 255, max(1, size // 85), cv2.LINE_AA)
    return rgb, ink


def vertical(x, size=256):
    lines = np.zeros((size, size), bool)
    lines[20:-20, x] = True
    return lines


def test_lines_equal_to_the_edges_score_1():
    assert metrics.boundary_f1(vertical(100), vertical(100)) == 1


@pytest.mark.parametrize("shift, wanted", [(3, 1.0), (4, 0.0), (60, 0.0)])
def test_a_shift_counts_only_beyond_the_tolerance(shift, wanted):
    assert metrics.boundary_f1(vertical(100), vertical(100 + shift)) == wanted


def test_f1_is_symmetric_and_lies_between_precision_and_recall():
    both = vertical(60) | vertical(160)
    one = vertical(60)
    assert metrics.boundary_f1(both, one) == metrics.boundary_f1(one, both) == pytest.approx(2 / 3)  # P = 1, R = 1/2


def test_missing_edges_score_0_and_an_empty_drawing_of_an_empty_page_1():
    nothing = np.zeros((256, 256), bool)
    assert metrics.boundary_f1(vertical(100), nothing) == 0
    assert metrics.boundary_f1(nothing, vertical(100)) == 0
    assert metrics.boundary_f1(nothing, nothing) == 1


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_a_disc_follows_its_own_outline_at_every_size(size):
    rgb, ink = disc(size)
    assert metrics.line_f1(ink, rgb) > 0.95
    assert metrics.line_f1(ink, disc(size, radius=0.4)[0]) == 0
    assert metrics.line_f1(ink, np.full_like(rgb, 255)) == 0


def test_the_width_of_the_pen_does_not_count():
    rgb, _ = disc()
    for width in (1, 3, 7):
        ink = np.zeros((256, 256), np.uint8)
        cv2.circle(ink, (128, 128), int(256 * 0.3), 255, width)
        assert metrics.line_f1(ink, rgb) > 0.95


def test_line_f1_falls_as_the_figure_moves_away():
    _, ink = disc()
    scores = [metrics.line_f1(ink, disc(dx=dx)[0]) for dx in (0, 6, 12)]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[2] + 0.3


def test_a_blur_beyond_recognition_loses_the_line():
    rgb, ink = disc()
    assert metrics.line_f1(ink, cv2.GaussianBlur(rgb, (0, 0), 40)) < 0.2


def test_the_figure_is_the_disc_with_its_hole_filled():
    rgb, _ = disc()
    cv2.circle(rgb, (128, 128), 20, (255, 255, 255), -1)
    figure = metrics.figure_mask(rgb)
    assert figure[128, 128] and not figure[5, 5]
    assert figure.mean() == pytest.approx(np.pi * 0.3**2, rel=0.03)


def test_colour_shift_has_the_sign_of_the_colours_and_is_0_for_equal_pictures():
    red, blue = disc(colour=(220, 30, 30))[0], disc(colour=(30, 30, 220))[0]
    figure = metrics.figure_mask(red)
    assert metrics.colour_shift(red, red, figure) == 0
    assert metrics.colour_shift(red, blue, figure) > 80
    assert metrics.colour_shift(blue, red, figure) == pytest.approx(-metrics.colour_shift(red, blue, figure))


def test_colour_outside_the_figure_does_not_count():
    red, blue = disc(colour=(220, 30, 30))[0], disc(colour=(220, 30, 30))[0]
    figure = metrics.figure_mask(red)
    blue[:20] = (0, 0, 255)
    assert metrics.colour_shift(red, blue, figure) == 0


def test_the_nearest_colour_is_the_one_painted_and_grey_has_none():
    names = ("red", "yellow", "green", "blue")
    rgb, _ = disc()
    alpha = metrics.figure_mask(rgb).astype(np.uint8) * 255
    for name in names:
        assert metrics.nearest_colour(recolour(rgb, alpha, name), alpha > 0, names) == name
    assert metrics.nearest_colour(disc(colour=(128, 128, 128))[0], alpha > 0, names) is None


def test_sharpness_is_1_for_the_same_pictures_and_falls_with_every_blur():
    real = np.stack([disc()[0], disc(radius=0.2)[0]])
    blurred = [np.stack([cv2.GaussianBlur(p, (0, 0), s) for p in real]) for s in (0.5, 1, 2, 4)]
    ratios = [metrics.sharpness_ratio(made, real) for made in (real, *blurred)]
    assert ratios[0] == 1
    assert all(a > b for a, b in zip(ratios, ratios[1:]))


def test_pairwise_distance_is_0_for_copies_and_grows_with_noise():
    rng = np.random.default_rng(0)
    base = np.full((4, 16, 16, 3), 128.0)
    noise = rng.normal(size=base.shape)
    assert metrics.pairwise_distance(base) == 0
    assert metrics.pairwise_distance(base + 20 * noise) == pytest.approx(2 * metrics.pairwise_distance(base + 10 * noise))
    # two independent pictures of standard deviation 10 are sqrt(2) * 10 apart
    assert metrics.pairwise_distance(base + 10 * noise) == pytest.approx(14.1, rel=0.05)
