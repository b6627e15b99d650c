"""The monitor of latents: silent on what it was made of, an alarm for another scale, another offset, and samples that drift off."""

import json
import logging

import numpy as np
import pytest
import torch
from layouts import build_small_folder

from training import monitor
from training.batches import Corpus
from training.config import Config


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
