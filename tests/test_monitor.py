"""The monitor of latents: silent on what it was made of, an alarm for another scale, another offset, and samples that drift off."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import build_small_folder

from training import monitor
from training.batches import Corpus
from training.config import Config
from training.teacher import validation_loss


def latents(count: int, seed: int = 0, channels: int = 6) -> torch.Tensor:
    """Latents whose pictures differ in their means, as real ones do: [count, channels, 4, 4]."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    return 0.5 * normal(count, channels, 1, 1) + normal(count, channels, 4, 4) * (0.5 + torch.rand(count, 1, 1, 1, generator=g)) + torch.arange(channels)[:, None, None] / 5


def test_statistics_are_those_of_the_definition():
    x = latents(50)
    found = monitor.statistics(x)
    torch.testing.assert_close(torch.tensor(found["mean"]), x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(torch.tensor(found["std"]), x.transpose(0, 1).flatten(1).std(dim=1, correction=0))
    # over many draws of n pictures the standard error of mean and std is the one that the spread foretells
    draws = [monitor.statistics(latents(40, seed)) for seed in range(200)]
    for key in ("mean", "std"):
        measured = torch.tensor([d[key] for d in draws]).std(dim=0)
        foretold = torch.tensor([d[f"{key}_spread"] for d in draws]).mean(dim=0) / 40**0.5
        torch.testing.assert_close(measured, foretold, rtol=0.2, atol=0)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_pictures_of_the_same_kind_are_inside_the_band(count):
    reference = monitor.statistics(latents(400))
    found = [monitor.compare(reference, latents(count, seed), band=4.0) for seed in range(1, 101)]
    assert sum(f["alarm"] for f in found) == 0
    assert 0.05 < np.mean([f["drift"] for f in found]) < 0.6, "the band is in proportion to what varies by chance"


@pytest.mark.parametrize("change", [lambda x: 1.5 * x, lambda x: x / 1.5, lambda x: x + 0.7, lambda x: x.roll(2, 1), lambda x: x * float("nan")],
                         ids=["scaled up", "scaled down", "shifted", "channels exchanged", "not a number"])
def test_what_changed_is_outside(change):
    reference = monitor.statistics(latents(400))
    found = [monitor.compare(reference, change(latents(32, seed)), band=4.0) for seed in range(1, 21)]
    assert all(f["alarm"] == 1 and f["drift"] > 1 for f in found)


def test_drift_grows_with_the_change():
    reference = monitor.statistics(latents(400))
    drifts = [monitor.compare(reference, latents(64, 1) * scale, band=4.0)["drift"] for scale in (1.0, 1.2, 1.5, 2.0)]
    assert drifts == sorted(drifts)


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="8 channels, the stored reference 6"):
        monitor.compare(monitor.statistics(latents(20)), latents(20, channels=8), band=4.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = build_small_folder(tmp_path_factory.mktemp("base"), controlnet=False)
    config = Config(data="assets/sample", size_px=32, precision="fp32", vae=str(folder / "vae"), text_encoder=str(folder))
    return Corpus(config, tmp_path_factory.mktemp("out"), "val")


def test_a_check_stores_the_reference_once_and_is_silent_while_nothing_changes(corpus, tmp_path, caplog):
    first = monitor.check(tmp_path, corpus)
    stored = (tmp_path / monitor.FILE).read_text()
    assert json.loads(stored)["pictures"] == len(corpus.latents.images)
    assert first == monitor.check(tmp_path, corpus) and first["latent_alarm"] == 0 and not caplog.records
    assert (tmp_path / monitor.FILE).read_text() == stored
    assert first["latent_std"] == pytest.approx(float(torch.from_numpy(corpus.latents.images[:].astype(np.float32)).std()), rel=0.1)


def test_a_scaled_autoencoder_raises_the_alarm(corpus, tmp_path, caplog):
    monitor.check(tmp_path, corpus)
    factor = corpus.vae.config.scaling_factor
    try:
        corpus.vae.register_to_config(scaling_factor=2 * factor)
        with caplog.at_level(logging.WARNING):
            found = monitor.check(tmp_path, corpus)
    finally:
        corpus.vae.register_to_config(scaling_factor=factor)
    assert found["latent_alarm"] == 1 and "ALARM" in caplog.text and "scaling_factor" in caplog.text


def test_samples_alarm_once_they_have_been_inside(corpus, tmp_path, caplog):
    good = torch.from_numpy(corpus.latents.images[:16].astype(np.float32))
    bad = 3 * good
    assert monitor.check(tmp_path, corpus, bad)["sample_alarm"] == 0, "an untrained model is no alarm"
    assert monitor.check(tmp_path, corpus, good)["sample_alarm"] == 0
    found = monitor.check(tmp_path, corpus, bad)
    assert found["sample_alarm"] == 1 and found["sample_drift"] > 1 and found["latent_alarm"] == 0
    assert "sampled latents left" in caplog.text


def test_samples_that_stay_outside_are_told_once_and_again_when_they_have_been_back(corpus, tmp_path, caplog):
    good = torch.from_numpy(corpus.latents.images[:16].astype(np.float32))
    found = [monitor.check(tmp_path, corpus, x)["sample_alarm"] for x in (3 * good, good, 3 * good, 3 * good, 3 * good, good, 3 * good)]
    assert found == [0, 0, 1, 1, 1, 0, 1], "the number stays on the curve"
    assert caplog.text.count("sampled latents left") == 2


# ---- no more at once than the recipe allows ---------------------------------------------------------------------------


def test_pictures_are_encoded_in_parts_to_the_same_latents(corpus, monkeypatch):
    sizes, encode = [], corpus.vae.encode
    monkeypatch.setattr(corpus.vae, "encode", lambda x, **kwargs: (sizes.append(len(x)), encode(x, **kwargs))[1])
    batch = corpus.fixed(10)
    whole = monitor.encode(corpus, batch)
    monkeypatch.setattr(corpus, "config", replace(corpus.config, encode_batch=4))
    torch.testing.assert_close(monitor.encode(corpus, batch), whole, rtol=1e-5, atol=1e-5)
    assert sizes == [10, 4, 4, 2]


@pytest.mark.parametrize("others", [False, True])
def test_the_validation_loss_is_taken_in_parts_to_the_same_number(corpus, others):
    sizes = []

    def predict(x_s, s, batch):
        sizes.append(len(x_s))
        assert len(batch.captions) == len(batch.text) == len(batch.rows) == len(s) and batch.shelf == 0
        return 0.3 * x_s + batch.cond * s.view(-1, 1, 1, 1) + batch.text.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    whole = validation_loss(predict, corpus, corpus.config, others)
    assert validation_loss(predict, corpus, replace(corpus.config, encode_batch=3), others) == pytest.approx(whole, rel=1e-5)
    assert sizes[0] == sum(sizes[1:]) > 3 and max(sizes[1:]) == 3
    assert others == (whole != validation_loss(predict, corpus, corpus.config))
