"""The distillation losses: identities, closed forms, and the public trainer's four defects, each of which must fail here."""

import math

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana_app.model import trigflow
from sana_app.model.attention import use_explicit_softmax
from sana_app.model.convert import sprint_from_teacher
from sana_app.model.network import TrigFlowTeacher
from training.batches import Batch
from training.discriminator import Discriminator, Head
from training.flow import flow_loss, flow_path, shifted_time
from training.losses import (
    hinge_discriminator,
    hinge_generator,
    jvp_of_student,
    normalised_tangent,
    scm_loss,
    scm_tangent,
    tangent_directions,
)
from training.sampling import guided_F
from training.student import Logvar, adversarial_times

SIGMA = trigflow.SIGMA_DATA


def small_teacher(seed: int = 0) -> SanaTransformer2DModel:
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, sample_size=4, patch_size=1, num_attention_heads=2, attention_head_dim=32, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=16,
        qk_norm="rms_norm_across_heads", timestep_scale=0.001, interpolation_scale=1.0).eval()
    use_explicit_softmax(model)
    return model


def latents(count: int = 2, dtype=torch.float64, seed: int = 1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x0, z = (torch.randn(count, 4, 4, 4, generator=g, dtype=dtype) * SIGMA for _ in range(2))
    return x0, z, torch.rand(count, generator=g, dtype=dtype) * 1.3 + 0.1


def gaussian_F(a: float):
    """The perfect student's F for data of std `a`: f(x, t) = x·a/sqrt(a²cos² + sigma²sin²) = cos t·x - sin t·sigma·F."""
    def F(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1, 1, 1)
        x_t = x * SIGMA
        f = x_t * a / torch.sqrt(a ** 2 * torch.cos(t) ** 2 + SIGMA ** 2 * torch.sin(t) ** 2)
        return (torch.cos(t) * x_t - f) / (torch.sin(t) * SIGMA)
    return F


def gaussian_dxdt(x_t: torch.Tensor, t: torch.Tensor, a: float) -> torch.Tensor:
    cos, sin = torch.cos(t).view(-1, 1, 1, 1), torch.sin(t).view(-1, 1, 1, 1)
    return (SIGMA ** 2 - a ** 2) * sin * cos / (a ** 2 * cos ** 2 + SIGMA ** 2 * sin ** 2) * x_t


@pytest.mark.parametrize("a", [0.2, 0.9, 1.7])
def test_tangent_vanishes_for_the_perfect_student_of_gaussian_data(a):
    x0, z, t = latents()
    x_t = trigflow.interpolate(x0 * a / SIGMA, z, t)
    dxdt = gaussian_dxdt(x_t, t, a)
    F_minus, dF = jvp_of_student(gaussian_F(a), x_t / SIGMA, t, dxdt)
    g = scm_tangent(F_minus, dF, x_t, dxdt, t, r=1.0)
    assert g.abs().max() < 1e-12


@pytest.mark.parametrize("wrong", ["sign of dxdt", "sigma_data of the direction", "time direction left out"])
def test_tangent_notices_a_wrong_formula(wrong):
    a = 0.9
    x0, z, t = latents()
    x_t = trigflow.interpolate(x0 * a / SIGMA, z, t)
    dxdt = gaussian_dxdt(x_t, t, a)
    vx, vt = tangent_directions(dxdt, t)
    if wrong == "sign of dxdt":
        vx = -vx
    elif wrong == "sigma_data of the direction":
        vx = vx * SIGMA
    else:
        vt = torch.zeros_like(vt)
    F_minus, dF = torch.func.jvp(gaussian_F(a), (x_t / SIGMA, t), (vx, vt))
    assert scm_tangent(F_minus, dF, x_t, dxdt, t, r=1.0).abs().max() > 1e-3


def test_training_on_gaussian_data_reaches_the_closed_form():
    """A student with one free number per time learns the known answer from the sCM loss alone."""
    a = 1.5
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()

    def student(x, t):
        return x * net(torch.stack([torch.sin(t), torch.cos(t)], dim=-1)).view(-1, 1, 1, 1)

    opt = torch.optim.Adam(net.parameters())
    g = torch.Generator().manual_seed(0)
    for step in range(1500):
        for group in opt.param_groups:
            group["lr"] = 1e-2 * (1 - step / 1500)
        x0 = torch.randn(64, 1, 4, 4, generator=g, dtype=torch.float64) * a
        z = torch.randn(64, 1, 4, 4, generator=g, dtype=torch.float64) * SIGMA
        t = trigflow.t_from_normal(torch.randn(64, generator=g, dtype=torch.float64), 0.0, 1.6)
        x_t = trigflow.interpolate(x0, z, t)
        dxdt = gaussian_dxdt(x_t, t, a)
        F_minus, dF = jvp_of_student(student, x_t / SIGMA, t, dxdt)
        tangent = normalised_tangent(scm_tangent(F_minus, dF, x_t, dxdt, t, min(1.0, step / 50)))
        scm_loss(student(x_t / SIGMA, t), F_minus, tangent, t, torch.zeros_like(t)).mean().backward()
        opt.step()
        opt.zero_grad()
    z = torch.randn(4000, 1, 1, 1, generator=g, dtype=torch.float64) * SIGMA
    t = torch.full((4000,), trigflow.T_MAX, dtype=torch.float64)
    one_step = trigflow.clean_from_F(z, student(z / SIGMA, t), t).std().item()
    assert one_step == pytest.approx(a, rel=0.1)


def test_jvp_of_the_real_student_is_a_central_difference():
    student = TrigFlowTeacher(sprint_from_teacher(small_teacher()).double())
    use_explicit_softmax(student)
    torch.nn.init.normal_(student.transformer.proj_out.weight, std=0.1)
    x0, z, t = latents()
    x_t = trigflow.interpolate(x0, z, t)
    dxdt = trigflow.velocity(x0, z, t)
    text, mask, w = torch.randn(2, 5, 16, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64), torch.tensor([4.0, 5.0], dtype=torch.float64)
    call = lambda x, t: student(x, t, text, mask, guidance=w)
    _, dF = jvp_of_student(call, x_t / SIGMA, t, dxdt)
    vx, vt = tangent_directions(dxdt, t)
    h = 1e-4
    with torch.no_grad():
        difference = (call(x_t / SIGMA + h * vx, t + h * vt) - call(x_t / SIGMA - h * vx, t - h * vt)) / (2 * h)
    # parts of the network run in float32 whatever its dtype (norms, softmax): a relative 1e-2 is what h allows
    torch.testing.assert_close(dF, difference, rtol=2e-2, atol=2e-3 * float(difference.abs().max()))


def test_gradient_of_the_scm_loss_is_the_weighted_tangent():
    x0, z, t = latents()
    F = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    scm_loss(F, F.detach(), g, t, torch.zeros_like(t)).sum().backward()
    weight = (1 / (SIGMA * torch.tan(t))).view(-1, 1, 1, 1)
    torch.testing.assert_close(F.grad, -2 * weight * g / 64)


def test_scm_loss_is_finite_at_t_max():
    t = torch.full((2,), trigflow.T_MAX)
    F = torch.randn(2, 4, 4, 4)
    assert torch.isfinite(scm_loss(F, F, torch.randn_like(F), t, torch.zeros(2))).all()


def test_adversarial_student_time_is_t_max_not_the_probability():
    # a public port feeds 0.5, the probability, as an angle
    t = torch.rand(10_000)
    student, _ = adversarial_times(torch.randn(10_000), torch.rand(10_000), t, 0.5)
    replaced = student != t
    assert (student[replaced] == trigflow.T_MAX).all()
    assert abs(replaced.float().mean() - 0.5) < 0.03


def test_guidance_embedder_learns():
    # a public port zero-initialises both layers: their gradients then stay zero for ever
    student = sprint_from_teacher(small_teacher())
    torch.nn.init.normal_(student.proj_out.weight, std=0.1)
    opt = torch.optim.SGD(student.parameters(), 1.0)
    before = {k: v.clone() for k, v in student.time_embed.guidance_embedder.state_dict().items()}
    net = TrigFlowTeacher(student)
    for step in range(2):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(2, 4, 4, 4, generator=g)
        net(x, torch.tensor([0.5, 1.0]), torch.randn(2, 5, 16, generator=g), torch.ones(2, 5), guidance=torch.tensor([1.0, 5.0])).square().mean().backward()
        opt.step()
        opt.zero_grad()
    changed = {k: not torch.equal(v, before[k]) for k, v in student.time_embed.guidance_embedder.state_dict().items()}
    assert all(changed.values()), changed


def test_real_and_fake_reach_different_logits_and_the_teacher_stays_frozen():
    teacher = TrigFlowTeacher(small_teacher()).requires_grad_(False)
    disc = Discriminator(teacher, (0, 2))
    assert all(name.startswith("heads.") for name in disc.state_dict())
    g = torch.Generator().manual_seed(0)
    text, mask, t = torch.randn(8, 5, 16, generator=g), torch.ones(8, 5), torch.full((8,), 0.7)
    real, fake = torch.randn(8, 4, 4, 4, generator=g) * 0.3 + 0.5, torch.randn(8, 4, 4, 4, generator=g)
    opt = torch.optim.Adam(disc.parameters(), 2e-3)
    margins = []
    for _ in range(30):
        a, b = disc(real, t, text, mask), disc(fake, t, text, mask)
        margins.append((a.mean() - b.mean()).item())
        hinge_discriminator(a, b).mean().backward()
        assert all(p.grad is None for p in teacher.parameters())
        opt.step()
        opt.zero_grad()
    assert margins[-1] > margins[0] + 0.5
    x = fake.clone().requires_grad_(True)
    hinge_generator(disc(x, t, text, mask)).mean().backward()
    assert x.grad.abs().sum() > 0


def test_autoguidance_moves_away_from_the_weak_teacher_and_a_copy_of_the_teacher_changes_nothing():
    g = torch.Generator().manual_seed(0)
    teacher, weak = (TrigFlowTeacher(small_teacher(seed)).requires_grad_(False) for seed in (0, 1))
    text, mask, t = torch.randn(2, 5, 16, generator=g), torch.ones(2, 5), torch.tensor([0.4, 1.2])
    x, no_text = torch.randn(2, 4, 4, 4, generator=g), torch.zeros(2, 5, 16)
    batch = Batch(x0=x, cond=x, text=text, mask=mask, null_text=no_text, null_mask=mask, rows=None, captions=[])
    plain = guided_F(teacher, x, t, batch, 2.0)
    torch.testing.assert_close(guided_F(teacher, x, t, batch, 2.0, 1.0, teacher, 3.0), plain)
    moved = guided_F(teacher, x, t, batch, 2.0, 1.0, weak, 3.0) - plain
    torch.testing.assert_close(moved, 3 * (teacher(x, t, text, mask) - weak(x, t, text, mask)), atol=1e-5, rtol=1e-4)
    assert moved.abs().mean() > 1e-3


def test_hinge_losses_have_their_known_values():
    assert hinge_discriminator(torch.ones(2, 3), -torch.ones(2, 3)).tolist() == [0.0, 0.0]
    assert hinge_discriminator(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [1.0, 1.0]
    assert hinge_generator(torch.full((2, 3), 0.25)).tolist() == [-0.25, -0.25]


def test_a_verdict_is_of_one_sample_alone_and_sees_what_all_fakes_share():
    torch.manual_seed(0)
    head, x = Head(16).eval(), torch.randn(4, 9, 16)
    torch.testing.assert_close(head(x)[:2], head(x[:2]))
    shift = torch.zeros(16)
    shift[3] = 2.0  # the same in every sample: a norm over the batch would take it away
    assert (head(x + shift) - head(x)).mean().abs() > 1e-3


def test_logvar_starts_at_the_scale_of_a_unit_tangent():
    student = sprint_from_teacher(small_teacher())
    logvar = Logvar(64, 64)(student, torch.tensor([0.3, 1.2]), torch.tensor([4.0, 5.0]))
    torch.testing.assert_close(logvar, torch.full((2,), -math.log(64)))


def test_flow_path_and_loss():
    x0, z, _ = latents()
    s = torch.tensor([0.25, 0.5], dtype=torch.float64)
    h = 1e-6
    slope = (flow_path(x0, z, s + h) - flow_path(x0, z, s - h)) / (2 * h)
    torch.testing.assert_close(slope, z - x0)
    assert flow_loss(z - x0, x0, z).abs().max() < 1e-12
    normal = torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert (shifted_time(normal, 3.0) > shifted_time(normal, 1.0)).all()
