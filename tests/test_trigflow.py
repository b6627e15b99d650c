"""Identities of the TrigFlow maths, in float64 to 1e-12 (docs: maths; every formula is shown by a property it must have)."""

import math

import pytest
import torch
from torch.testing import assert_close

from sana_app.model import trigflow as tf

EXACT = dict(rtol=0, atol=1e-12)
SIGMA = 0.5
A = 0.8  # std of the Gaussian toy data; different from SIGMA, or half of the mistakes cancel


@pytest.fixture
def sample():
    g = torch.Generator().manual_seed(0)

    def randn():
        return torch.randn(7, 3, 4, 5, generator=g, dtype=torch.float64)

    t = torch.linspace(0.0, tf.T_MAX, 7, dtype=torch.float64)
    return A * randn(), SIGMA * randn(), t


def gaussian_flow_velocity(x_s, s):
    """E[z - x0 | x_s] for x0 ~ N(0, (A/SIGMA)^2), z ~ N(0, 1): regression of a Gaussian on a Gaussian."""
    a = A / SIGMA
    return (s - (1 - s) * a**2) / ((1 - s) ** 2 * a**2 + s**2) * x_s


def gaussian_dxdt(x, t):
    """dx/dt of the probability-flow ODE for data of std A."""
    variance = A**2 * torch.cos(t) ** 2 + SIGMA**2 * torch.sin(t) ** 2
    return (SIGMA**2 - A**2) * torch.sin(t) * torch.cos(t) / variance * x


def gaussian_student(x, t):
    """The perfect one-step map of the same ODE."""
    return x * A / torch.sqrt(A**2 * torch.cos(t) ** 2 + SIGMA**2 * torch.sin(t) ** 2)


def gaussian_F(x, t):
    """TrigFlow output of the exact flow teacher, through the functions under test."""
    s, x_s = tf.flow_time(t), tf.flow_input(x, t, SIGMA)
    return tf.flow_output_to_F(gaussian_flow_velocity(x_s, tf.expand_to(s, x_s)), x_s, s)


def test_path_starts_at_data_and_ends_at_noise(sample):
    x0, z, _ = sample
    assert_close(tf.interpolate(x0, z, 0.0), x0, **EXACT)
    assert_close(tf.interpolate(x0, z, tf.T_MAX), z, **EXACT)


def test_velocity_is_the_time_derivative_of_interpolate(sample):
    x0, z, t = sample
    _, derivative = torch.func.jvp(lambda t: tf.interpolate(x0, z, t), (t,), (torch.ones_like(t),))
    assert_close(tf.velocity(x0, z, t), derivative, **EXACT)


def test_times_convert_there_and_back():
    t = torch.linspace(0.0, tf.T_MAX, 101, dtype=torch.float64)
    s = tf.flow_time(t)
    assert_close(tf.trigflow_time(s), t, **EXACT)
    assert s[0] == 0 and (s[1:] > s[:-1]).all()
    assert_close(s[-1], torch.tensor(1.0, dtype=torch.float64), **EXACT)
    assert_close(tf.flow_scale(s), 1 / (torch.sin(t) + torch.cos(t)), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t_max_never_leaves_the_flow_interval(dtype):
    rounding = torch.finfo(dtype).eps
    assert tf.flow_time(torch.tensor(tf.T_MAX, dtype=dtype)) <= 1 + rounding
    rounded_constant = torch.tensor(1.57080, dtype=dtype)
    assert tf.flow_time(rounded_constant) > 1 + 1e-6, "public configs' 1.57080 is past pi/2"


def test_flow_input_is_the_flow_path_of_unit_variance_latents(sample):
    x0, z, t = sample
    s = tf.expand_to(tf.flow_time(t), x0)
    x_t = tf.interpolate(x0, z, t)
    assert_close(tf.flow_input(x_t, t, SIGMA), (1 - s) * (x0 / SIGMA) + s * (z / SIGMA), **EXACT)


def test_true_flow_velocity_becomes_the_true_trigflow_velocity(sample):
    x0, z, t = sample
    s, x_s = tf.flow_time(t), tf.flow_input(tf.interpolate(x0, z, t), t, SIGMA)
    F = tf.flow_output_to_F((z - x0) / SIGMA, x_s, s)
    assert_close(SIGMA * F, tf.velocity(x0, z, t), **EXACT)


def test_outputs_convert_there_and_back(sample):
    v, x_s, t = sample
    s = tf.flow_time(t)
    assert_close(tf.F_to_flow_output(tf.flow_output_to_F(v, x_s, s), x_s, s), v, **EXACT)
    assert_close(tf.flow_output_to_F(tf.F_to_flow_output(v, x_s, s), x_s, s), v, **EXACT)


def test_true_F_leads_to_the_clean_latent_and_along_the_path(sample):
    x0, z, t = sample
    x_t, F = tf.interpolate(x0, z, t), tf.velocity(x0, z, t) / SIGMA
    assert_close(tf.clean_from_F(x_t, F, t, SIGMA), x0, **EXACT)
    assert_close(tf.ode_step(x_t, F, t, t / 3, SIGMA), tf.interpolate(x0, z, t / 3), **EXACT)


def test_batch_times_equal_one_time_each(sample):
    x0, z, t = sample
    each = torch.stack([tf.interpolate(x0[i], z[i], t[i].item()) for i in range(len(t))])
    assert_close(tf.interpolate(x0, z, t), each, **EXACT)


def test_gaussian_teacher_in_trigflow_form_has_the_closed_form_velocity(sample):
    x, _, t = sample
    assert_close(SIGMA * gaussian_F(x, t), gaussian_dxdt(x, tf.expand_to(t, x)), **EXACT)


def test_gaussian_student_is_constant_along_the_ode(sample):
    """The total derivative d f(x_t, t)/dt along dx/dt is 0 for every t: what the sCM loss drives to 0."""
    x, _, t = sample
    t = tf.expand_to(t, x).expand_as(x).contiguous()
    value, derivative = torch.func.jvp(gaussian_student, (x, t), (gaussian_dxdt(x, t), torch.ones_like(t)))
    assert_close(derivative, torch.zeros_like(value), **EXACT)


def test_gaussian_one_step_sample_has_the_data_std():
    z = torch.tensor([SIGMA], dtype=torch.float64)
    t = torch.tensor([tf.T_MAX], dtype=torch.float64)
    assert_close(gaussian_student(z, t), torch.tensor([A], dtype=torch.float64), **EXACT)


def test_many_flow_euler_and_trigflow_euler_steps_end_at_the_same_clean_latent():
    """Both are first order in the step, so the distance to the exact answer must shrink like 1/n."""
    z = torch.full((1, 1, 1, 1), SIGMA, dtype=torch.float64)

    def trigflow_euler(n):
        x = z
        for t, u in zip(tf.ode_timesteps(n)[:-1], tf.ode_timesteps(n)[1:]):
            t = torch.tensor([t], dtype=torch.float64)
            x = tf.ode_step(x, gaussian_F(x, t), t, u, SIGMA)
        return x.item()

    def flow_euler(n):
        x = z / SIGMA
        for i in range(n):
            x = x - gaussian_flow_velocity(x, 1 - i / n) / n
        return x.item() * SIGMA

    for solve in (trigflow_euler, flow_euler):
        coarse, fine = abs(solve(500) - A), abs(solve(2000) - A)
        assert fine < 1e-3 and 3 < coarse / fine < 5, (solve.__name__, coarse, fine)


def test_sprint_times_are_the_papers():
    assert tf.sprint_timesteps(1) == [math.pi / 2, 0]
    assert tf.sprint_timesteps(2) == [math.atan(400), 1.3, 0]
    assert tf.sprint_timesteps(4) == [math.atan(400), 1.3, 1.1, 0.6, 0]
    with pytest.raises(ValueError, match="1, 2 or 4"):
        tf.sprint_timesteps(3)


def test_ode_times_are_evenly_spaced():
    times = torch.tensor(tf.ode_timesteps(10), dtype=torch.float64)
    assert times[0] == tf.T_MAX and times[-1] == 0
    assert_close(times.diff(), torch.full((10,), -tf.T_MAX / 10, dtype=torch.float64), **EXACT)


def test_training_times_have_log_normal_noise_levels():
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = tf.t_from_normal(normal, mean=0.2, std=1.6, sigma_data=SIGMA)
    assert_close((torch.log(torch.tan(t) * SIGMA) - 0.2) / 1.6, normal, rtol=0, atol=1e-9)
    assert (t > 0).all() and (t < tf.T_MAX).all()
