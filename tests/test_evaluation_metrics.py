"""FID, KID and the caption scores by their properties: closed forms, monotone in damage, right captions above wrong ones."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from training.data.cache import Pixels, pixel_cache
from training.evaluate import choose
from training.evaluation.distances import fid, kid
from training.evaluation.features import INCEPTION_FILE, inception_features, load_features, own_features, resized
from training.evaluation.match import clip_folder, clip_score, fit_linear, fit_on, fit_rows, load_clip, load_sentences, own_numbers

SAMPLE = Path(__file__).parent.parent / "assets" / "sample"


@pytest.fixture(scope="module")
def features():
    return own_features()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def real(cache):
    """The held-out pictures of the sample that are no skin tones of another, 64 px: ten, of concepts the training split does not have."""
    return choose(pixel_cache(SAMPLE, "val", 64, cache), 100, 0)


def exact(mean, std, count, seed):
    """Points whose sample mean and covariance are exactly N(mean, diag(std²)): [count, D]."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov(), upper=True))
    return x * torch.tensor(std) + torch.tensor(mean)


# ---- distances --------------------------------------------------------------------------------------------------


def test_fid_of_two_gaussians_is_the_closed_form():
    a, b = exact([0.0, 1.0, -2.0], [1.0, 0.5, 3.0], 40, 0), exact([1.0, 1.0, 1.0], [2.0, 0.5, 1.0], 60, 1)
    wanted = (1 + 0 + 9) + (1 + 0 + 4)  # |m₁ - m₂|² + Σ(s₁ - s₂)² for commuting covariances
    assert fid(a, b) == pytest.approx(wanted, abs=1e-6)
    assert fid(b, a) == pytest.approx(wanted, abs=1e-6)


def test_a_set_has_no_distance_to_itself_in_another_order():
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    other = x[torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    assert fid(x, other) == pytest.approx(0, abs=1e-4)
    assert kid(x, other) <= 0  # unbiased: no pair of a point with itself on the one side, all of them on the other


def test_kid_of_equal_distributions_is_zero_on_average_and_not_of_different_ones():
    draw = lambda seed, shift=0.0: torch.randn(100, 8, generator=torch.Generator().manual_seed(seed)) + shift
    same = np.array([kid(draw(2 * i), draw(2 * i + 1)) for i in range(30)])
    assert abs(same.mean()) < 3 * same.std() / np.sqrt(len(same))
    assert kid(draw(0), draw(1, 0.5)) > same.max()


def test_kid_leaves_the_random_numbers_of_others_alone():
    x = torch.randn(30, 4)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    kid(x, x + 1)
    assert_close(torch.rand(1), wanted)


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_distances_grow_with_the_damage(features, cache, damage):
    images = pixel_cache(SAMPLE, "val", 64, cache).images
    rng = np.random.default_rng(0)

    def damaged(strength):
        if damage == "blur":
            return [cv2.GaussianBlur(image, (0, 0), strength) for image in images]
        return [np.clip(image + rng.normal(0, strength, image.shape), 0, 255).round().astype(np.uint8) for image in images]
    x = features(images)
    rows = [x] + [features(damaged(s)) for s in ((6, 16, 40) if damage == "noise" else (0.6, 1.2, 2.4))]
    fids, kids = [fid(x, y) for y in rows], [kid(x, y) for y in rows]
    assert fids[0] == pytest.approx(0, abs=1e-2)
    assert fids == sorted(fids) and fids[1] > 1 and fids[3] > 2 * fids[2]
    assert kids == sorted(kids) and kids[3] > 0


def test_two_sets_of_other_features_or_of_one_picture_are_refused():
    with pytest.raises(ValueError, match="one kind of features"):
        fid(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least two"):
        kid(torch.zeros(1, 3), torch.zeros(4, 3))


# ---- features ---------------------------------------------------------------------------------------------------


def test_own_features_repeat_themselves_whatever_the_batch_and_say_that_they_are_own(features, real):
    together = features(real.images[:5])
    assert_close(together, torch.cat([features(real.images[i:i + 1]) for i in range(5)]), atol=1e-4, rtol=1e-4)
    assert_close(together, own_features()(real.images[:5]), atol=0, rtol=0)
    assert features.suffix == "_own" and "only with others of this project" in features.about and features.identity in features.about


def test_resizing_keeps_a_picture_of_the_right_size_and_the_mean_of_a_shrunk_one():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert resized(image[:, :64], 64).permute(1, 2, 0).numpy().tolist() == image[:, :64].tolist()
    assert abs(float(resized(image, 16).float().mean()) - image.mean()) < 2


def test_auto_takes_the_own_features_where_no_inception_weights_are(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_features("auto").suffix == "_own"
    with pytest.raises(ValueError, match="no Inception weights at"):
        load_features("auto", tmp_path / "missing.pth")


def test_inception_reads_the_published_layout_and_says_that_other_weights_are_none_of_the_published(tmp_path, real):
    torch_fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:  # the layout comes from the class itself; its constructor would download
        patch.setattr(torch_fidelity, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        weights = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(weights, tmp_path / INCEPTION_FILE)
    found = load_features("auto", tmp_path / INCEPTION_FILE)
    assert found.suffix == "_unpublished" and "NOT the published weights" in found.about
    x = found(real.images[:3])
    assert x.shape == (3, 2048) and bool(x.isfinite().all()) and float(x.std(0).max()) > 0


def test_a_weight_file_that_would_run_code_is_refused_without_running_it(tmp_path):
    pytest.importorskip("torch_fidelity")

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    pickle.loads((tmp_path / "trap.pth").read_bytes())
    (tmp_path / "ran").unlink()  # the trap works
    with pytest.raises(ValueError, match="read safely"):
        inception_features(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


# ---- captions ---------------------------------------------------------------------------------------------------


def test_ridge_regression_finds_a_linear_map():
    g = torch.Generator().manual_seed(0)
    x, true = 3 * torch.randn(400, 12, generator=g) + 1, torch.randn(12, 5, generator=g)
    y = x @ true + 2
    linear = fit_linear(x, y, ridge=1e-9)
    assert_close(((x - linear.mean) / linear.std) @ linear.weight + linear.centre, y, atol=1e-3, rtol=1e-3)
    assert_close(linear.cosines(x, y).diag(), torch.ones(400), atol=1e-4, rtol=0)
    assert fit_linear(x, y, ridge=10.0).weight.norm() < 0.2 * linear.weight.norm()


def test_held_out_pictures_score_higher_with_their_own_captions(features, real, cache):
    train, sentences = pixel_cache(SAMPLE, "train", 64, cache), load_sentences()
    linear = fit_on(train, real.images, features, sentences, cache)
    x = features(real.images)
    texts = sentences.encode(real.prompts)
    right = own_numbers(linear, x, texts, real.prompts)
    cosines = linear.cosines(x, texts)
    assert right["clip_own"] == pytest.approx(100 * float(cosines.diag().mean()))
    wrong = [float(cosines.roll(shift, 1).diag().mean()) for shift in range(1, len(texts))]  # every way of going round with the captions
    assert right["clip_own"] / 100 > max(wrong) + 0.02
    assert right["clip_own_top1"] >= 0.2  # chance 0.1; with 3,000 pictures to fit on instead of 200 it is 0.5 among 16
    noise = np.random.default_rng(0).integers(0, 256, real.images.shape, dtype=np.uint8)
    assert own_numbers(linear, features(noise), sentences.encode(real.prompts), real.prompts)["clip_own"] < right["clip_own"] - 5
    again = fit_on(train, real.images, features, sentences, cache)  # from the cache
    assert_close(again.weight, linear.weight, atol=0, rtol=0)


def test_the_fit_sees_no_picture_that_is_evaluated():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    meta = [{"toned": i < 3} for i in range(40)]
    pixels = Pixels(images, np.zeros((40, 4, 4), np.uint8), np.arange(41), [[f"caption {i}"] for i in range(40)], meta, "hash")
    rows = fit_rows(pixels, images[10:20])
    assert sorted(rows) == [*range(3, 10), *range(20, 40)]
    assert len(fit_rows(pixels, images)) == 0


def test_similar_sentences_lie_nearer_than_others():
    x = load_sentences().encode(["a red apple", "an apple that is red", "a fast car"])
    assert_close(x.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert x[0] @ x[1] > x[0] @ x[2] + 0.2


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIP in the published folder layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    names = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(names)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    torch.manual_seed(1)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(text_config=small | dict(vocab_size=len(vocab), max_position_embeddings=12, bos_token_id=52, eos_token_id=53, pad_token_id=53),
                        vision_config=small | dict(image_size=32, patch_size=8), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def test_the_clip_score_is_a_hundred_cosines_of_the_folders_model(tiny_clip, real):
    from transformers import CLIPModel, CLIPProcessor

    images, prompts = real.images[:3], ["red apple", "a cat", "blue car"]
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    with torch.no_grad():
        out = model(**processor(text=prompts, images=[torch.from_numpy(i).permute(2, 0, 1) for i in images], padding=True, return_tensors="pt"))
    cosines = (out.image_embeds * out.text_embeds).sum(1)
    wanted = 100 * float(cosines.mean())
    assert wanted > 1  # below 0 the score would be 0 whatever it was
    metric = load_clip(clip_folder(tiny_clip))
    assert clip_score(metric, images, prompts) == pytest.approx(wanted, abs=1e-3)
    assert clip_score(metric, images, prompts) == pytest.approx(wanted, abs=1e-3)  # nothing is left from the call before


def test_a_caption_too_long_for_clip_is_cut_but_keeps_its_end_token(tiny_clip):
    metric = load_clip(tiny_clip)
    ids = metric.processor(text=["abcdefghijklmnopqrstuvwxyz"])["input_ids"]
    assert ids.shape == (1, 12) and int(ids[0, -1]) == metric.model.config.text_config.eos_token_id


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no CLIP model at"):
        clip_folder(str(tmp_path))
