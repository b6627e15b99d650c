"""The truncation of a model folder: the noise that is drawn for a picture has the std that sampling.json says."""

import json

import pytest
import torch
from diffusers import SanaSprintPipeline
from diffusers.utils.torch_utils import randn_tensor
from layouts import build_small_folder

from sana_app.model import trigflow
from sana_app.model.network import predict_F
from sana_app.model.pipeline import SanaSprintControlNetPipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return SanaSprintControlNetPipeline.from_pretrained(build_small_folder(tmp_path_factory.mktemp("noise") / "model"))


def test_drawn_noise_is_scaled_and_given_latents_are_not(pipe):
    seven = lambda: torch.Generator().manual_seed(7)
    pipe.noise_scale = 1.0
    whole = pipe.noise(32, 32, seven())
    given = pipe("a cat", latents=whole, height=32, width=32, output_type="latent").images
    pipe.noise_scale = 0.7
    torch.testing.assert_close(pipe.noise(32, 32, seven()), 0.7 * whole)
    torch.testing.assert_close(pipe("a cat", latents=whole, height=32, width=32, output_type="latent").images, given, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_what_the_pipeline_draws_itself_is_scaled_at_every_step(pipe, steps):
    pipe.noise_scale = 0.7
    found = pipe("a cat", num_inference_steps=steps, height=32, width=32, seed=7, output_type="latent").images
    generator = torch.Generator().manual_seed(7)
    noise = pipe.noise(32, 32, generator)
    by_hand = pipe.denoise(noise, *pipe.encode_prompt("a cat"), timesteps=trigflow.sprint_timesteps(steps), generator=generator, noise_scale=0.7)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=0)


def test_the_noise_between_steps_is_scaled_too(pipe):
    times = trigflow.sprint_timesteps(4)
    embeds, mask = pipe.encode_prompt("a cat")
    noise = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    found = pipe.denoise(noise, embeds, mask, timesteps=times, generator=torch.Generator().manual_seed(2), noise_scale=0.6)

    draws, x_t = torch.Generator().manual_seed(2), noise * trigflow.SIGMA_DATA
    for t, u in zip(times[:-1], times[1:]):
        F = predict_F(pipe.transformer, x_t / trigflow.SIGMA_DATA, torch.tensor([t]), embeds, mask, 4.5)
        x0 = trigflow.clean_from_F(x_t, F, t)
        x_t = trigflow.interpolate(x0, 0.6 * trigflow.SIGMA_DATA * randn_tensor(noise.shape, generator=draws), u)
    torch.testing.assert_close(found, (x0 / trigflow.SIGMA_DATA).detach(), atol=1e-5, rtol=1e-5)


def test_a_folder_keeps_its_noise_scale_and_stock_diffusers_still_loads_it(pipe, tmp_path):
    pipe.noise_scale = 0.8
    pipe.save_pretrained(tmp_path / "model")
    assert SanaSprintControlNetPipeline.from_pretrained(tmp_path / "model").noise_scale == 0.8
    SanaSprintPipeline.from_pretrained(tmp_path / "model")
    pipe.noise_scale = 1.0
    pipe.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "sampling.json").exists()


@pytest.mark.parametrize("bad", [0, -1, 1.5, "0.8", True, None])
def test_a_bad_noise_scale_is_named(pipe, tmp_path, bad):
    pipe.noise_scale = 1.0
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "sampling.json").write_text(json.dumps({"noise_scale": bad}))
    with pytest.raises(ValueError, match="sampling.json holds noise_scale"):
        SanaSprintControlNetPipeline.from_pretrained(tmp_path / "model")
