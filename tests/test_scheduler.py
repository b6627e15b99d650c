"""TrigFlowScheduler: the ODE step with the calls of a diffusers scheduler."""

import pytest
import torch
from diffusers import SCMScheduler
from layouts import build_sprint_folder
from torch.testing import assert_close

from sana_app.model import trigflow
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.scheduler import TrigFlowScheduler


def gaussian(seed, std=0.5):
    return std * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def run(scheduler, x, model):
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def test_true_velocity_leads_from_noise_to_data_in_any_number_of_steps():
    x0, z = gaussian(0), gaussian(1)
    for steps in (1, 2, 7):
        scheduler = TrigFlowScheduler()
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps + 1
        out = run(scheduler, z, lambda x, t: trigflow.velocity(x0, z, t))
        assert_close(out, x0, rtol=0, atol=1e-5)


def test_every_step_points_to_the_clean_latent():
    x0, z = gaussian(0), gaussian(1)
    scheduler = TrigFlowScheduler()
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1]
    x_t = scheduler.add_noise(x0, z, t.expand(2))
    out = scheduler.step(trigflow.velocity(x0, z, t), t, x_t)
    assert_close(out.pred_original_sample, x0, rtol=0, atol=1e-5)
    assert_close(out.prev_sample, trigflow.interpolate(x0, z, scheduler.timesteps[2]), rtol=0, atol=1e-5)


def test_one_step_equals_the_stock_scheduler():
    x, out = gaussian(0), gaussian(1)
    ours, stock = TrigFlowScheduler(), SCMScheduler()
    ours.set_timesteps(1)
    stock.set_timesteps(1, timesteps=trigflow.sprint_timesteps(1), max_timesteps=None, intermediate_timesteps=None)
    a, b = (s.step(out, s.timesteps[0], x, return_dict=False) for s in (ours, stock))
    assert_close(a[0], b[0], rtol=0, atol=1e-6)
    assert_close(a[1], b[1], rtol=0, atol=1e-6)


def test_is_deterministic_between_steps():
    scheduler = TrigFlowScheduler()
    for seed in (0, 1):
        torch.manual_seed(seed)
        scheduler.set_timesteps(3)
        out = run(scheduler, gaussian(0), lambda x, t: x.sin())
        previous = out if seed == 0 else previous
    assert_close(out, previous, rtol=0, atol=0)


def test_times_are_the_given_ones():
    scheduler = TrigFlowScheduler()
    scheduler.set_timesteps(2, intermediate_timesteps=1.3)
    assert_close(scheduler.timesteps, torch.tensor([trigflow.T_MAX, 1.3, 0.0]))
    scheduler.set_timesteps(timesteps=[1.5, 0.4, 0.0])
    assert_close(scheduler.timesteps, torch.tensor([1.5, 0.4, 0.0]))
    scheduler.set_timesteps(1, max_timesteps=1.57080)
    assert scheduler.timesteps[0] == torch.tensor(trigflow.T_MAX)


@pytest.mark.parametrize("wrong", [
    dict(timesteps=[0.0, 1.0]), dict(timesteps=[1.0]), dict(timesteps=[2.0, 0.0]), dict(timesteps=[1.0, float("nan")]),
    dict(num_inference_steps=3, timesteps=[1.0, 0.0]), dict(num_inference_steps=0), dict(),
    dict(num_inference_steps=4, intermediate_timesteps=1.3),
])  # fmt: skip
def test_wrong_times_are_refused(wrong):
    with pytest.raises(ValueError):
        TrigFlowScheduler().set_timesteps(**wrong)


def test_saves_loads_and_samples_in_the_pipeline(tmp_path):
    TrigFlowScheduler(sigma_data=0.4).save_pretrained(tmp_path / "scheduler")
    scheduler = TrigFlowScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.sigma_data == 0.4
    folder = build_sprint_folder(tmp_path / "model")
    pipe = SanaSprintControlNetPipeline.from_pretrained(folder, scheduler=TrigFlowScheduler())
    times = trigflow.ode_timesteps(8)
    pictures = [
        pipe("a cat", seed=0, timesteps=times, num_inference_steps=8, output_type="pt").images for _ in range(2)
    ]
    assert_close(pictures[0], pictures[1], rtol=0, atol=0)
