"""The public Sprint trainer's defects: each check holds for our training step and fails when the defect is put into it.

The step is the real one (`Distillation.backward` with teacher, student and discriminator); hooks only look on. Four defects
of the diffusers port of the Sprint trainer, and two more that its way of writing brings along:

| defect                                                      | what it does                                               |
|-------------------------------------------------------------|------------------------------------------------------------|
| t_max is written 1.57080                                    | past pi/2: flow time above 1, sCM weight below 0           |
| the guidance embedder's two layers both start at zero       | no gradient ever reaches what reads the guidance scale     |
| the adversarial student's time is the probability, 0.5      | it is never trained where one-step sampling starts         |
| misaligned pairs double the prompts of the real side too    | real latents and captions no longer belong together        |
| real and fake are re-noised to the same times               | the two sides' draws are not independent                   |
| the explicit softmax goes on the linear self attention too  | the student trained is another network than the one shipped |
"""

import math

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch.autograd import forward_ad

import training.student
from sana_app.model import trigflow
from sana_app.model.attention import ExplicitSoftmaxAttnProcessor, use_explicit_softmax
from sana_app.model.convert import sprint_from_teacher
from sana_app.model.network import TrigFlowTeacher
from training.batches import Batch
from training.config import Config
from training.discriminator import Discriminator
from training.loop import Draws
from training.losses import hinge_discriminator, scm_loss
from training.student import Distillation, Logvar

COUNT = 4
HALF_PI = math.pi / 2
ROUNDING = 1e-7  # of float32 at pi/2; the public value is 3.7e-6 past it


class ToyCorpus:
    """Constant pictures; the caption of picture i holds the picture's own value, so that a pair can be recognised."""

    def draw(self, count: int, draws: Draws) -> Batch:
        value = torch.linspace(-1, 1, count).view(-1, 1, 1)
        text = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(4)) + value
        return Batch(x0=value[..., None].expand(-1, 4, 4, 4).clone(), cond=torch.zeros(count, 4, 4, 4), text=text, mask=torch.ones(count, 3),
                     null_text=torch.zeros(count, 3, 16), null_mask=torch.ones(count, 3), rows=None, captions=[""] * count)


def small_teacher() -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, sample_size=4, patch_size=1, num_attention_heads=1, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=1, cross_attention_head_dim=32, cross_attention_dim=32, caption_channels=16, qk_norm="rms_norm_across_heads",
        timestep_scale=0.001, interpolation_scale=1.0)


def distillation(kind: type[Distillation] = Distillation, **overrides) -> Distillation:
    """The real training step on a small pair, as the student stage sets it up."""
    config = Config(precision="fp32", student_batch=COUNT, disc_blocks=(0, 1), scm_warmup=0, **overrides)
    transformer = small_teacher()
    teacher, student = TrigFlowTeacher(transformer).requires_grad_(False).eval(), TrigFlowTeacher(sprint_from_teacher(transformer))
    use_explicit_softmax(teacher)
    use_explicit_softmax(student)
    return kind(config, teacher, student, Discriminator(teacher, config.disc_blocks), Logvar(32, 64))


def watch_student(losses: Distillation, steps: range) -> list[list[torch.Tensor]]:
    """(x, t) of every plain forward of the student (the JVP goes another way) during those steps."""
    seen = []

    def look(module, args):
        if forward_ad.unpack_dual(args[1]).tangent is None:
            seen.append([a.detach() for a in args[:2]])
    hook = losses.student.register_forward_pre_hook(look)
    for step in steps:
        losses.backward(step, Draws(0, step), ToyCorpus())
    hook.remove()
    return seen


# ---- t_max ------------------------------------------------------------------------------------------------------


def check_times_end_at_half_pi() -> None:
    """No time past pi/2 enters the student, and at t_max the loss does not reward errors."""
    times = torch.cat([t for _, t in watch_student(distillation(), range(4))]).double()
    assert (times == times.max()).sum() > 1 and times.max() > 1.5707, "t_max was in it"
    assert times.max() <= HALF_PI + ROUNDING, f"{times.max() - HALF_PI:.1e} past pi/2"
    assert trigflow.flow_time(times).max() <= 1 + ROUNDING
    t = torch.tensor([trigflow.T_MAX], dtype=torch.float64)
    F, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    small, large = (scm_loss(F * size, zero, zero, t, torch.zeros(1, dtype=torch.float64)) for size in (1.0, 1000.0))
    assert large >= small, "a larger error makes the loss smaller: the weight is negative"


@pytest.mark.parametrize("t_max", [trigflow.T_MAX, pytest.param(1.57080, id="defect")])
def test_t_max_is_half_pi(t_max, monkeypatch):
    monkeypatch.setattr(trigflow, "T_MAX", t_max)
    if t_max == HALF_PI:
        check_times_end_at_half_pi()
    else:
        with pytest.raises(AssertionError, match="past pi/2"):
            check_times_end_at_half_pi()


def test_a_time_past_half_pi_rewards_errors():
    weight = [float(scm_loss(*(torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 0.0, 0.0)), torch.tensor([t], dtype=torch.float64),
                             torch.zeros(1, dtype=torch.float64))) for t in (HALF_PI, 1.57080)]
    assert weight[0] >= 0 > weight[1]
    assert float(trigflow.flow_time(torch.tensor(1.57080, dtype=torch.float64))) > 1


# ---- guidance embedder ------------------------------------------------------------------------------------------


def check_student_learns_to_read_guidance(losses: Distillation) -> None:
    """After some steps of both losses the student answers differently to different guidance scales."""
    opt = torch.optim.AdamW(losses.student.parameters(), lr=3e-3)
    torch.nn.init.normal_(losses.student.transformer.proj_out.weight, std=0.1)
    for step in range(0, 8, 2):
        losses.backward(step, Draws(0, step), ToyCorpus())
        opt.step()
        opt.zero_grad()
    batch = ToyCorpus().draw(COUNT, Draws(0, 0))
    with torch.no_grad():
        low, high = (losses.student(batch.x0, torch.ones(COUNT), batch.text, batch.mask, guidance=w) for w in (2.0, 7.0))
    assert (low - high).abs().max() > 1e-5, "the guidance scale changes nothing"


@pytest.mark.parametrize("defect", [False, True])
def test_the_guidance_scale_can_be_learnt(defect):
    losses = distillation(guidance=(2.0, 7.0))
    if not defect:
        return check_student_learns_to_read_guidance(losses)
    for weight in losses.student.transformer.time_embed.guidance_embedder.parameters():
        torch.nn.init.zeros_(weight)
    with pytest.raises(AssertionError, match="changes nothing"):
        check_student_learns_to_read_guidance(losses)


# ---- the adversarial student's time ------------------------------------------------------------------------------


def check_half_of_the_adversarial_times_are_t_max() -> None:
    """On both sides of LADD about half of the student's samples start from pure noise, at t_max."""
    for steps, losses in ((range(0, 16, 2), distillation(scm_weight=0.0)), (range(1, 17, 2), distillation())):
        seen = watch_student(losses, steps)
        t = torch.cat([t for _, t in seen])
        at_t_max = (t - HALF_PI).abs() < ROUNDING
        assert 0.25 < at_t_max.float().mean() < 0.75, f"{at_t_max.float().mean():.2f} of the times are t_max"
        values, times = torch.unique(t, return_counts=True)
        assert (values[times > 1] - HALF_PI).abs().max() < ROUNDING, f"{values[times > 1].tolist()} come back: not drawn times"
        x = torch.cat([x for x, _ in seen])[at_t_max].mean(dim=(1, 2, 3))
        clean = ToyCorpus().draw(COUNT, Draws(0, 0)).x0[:, 0, 0, 0].repeat(len(seen))[at_t_max]
        assert (x - clean).abs().max() > 0.3, "nothing of the picture is left in the noise"


def probability_as_time(normal, chosen, t, share):
    """The public port's mix-up: the share's own value stands where t_max should."""
    return torch.where(chosen < share, torch.full_like(t, share), t), trigflow.t_from_normal(normal, -0.6, 1.0)


@pytest.mark.parametrize("defect", [False, True])
def test_the_adversarial_students_time_is_t_max(defect, monkeypatch):
    if not defect:
        return check_half_of_the_adversarial_times_are_t_max()
    monkeypatch.setattr(training.student, "adversarial_times", probability_as_time)
    with pytest.raises(AssertionError, match="0.00 of the times are t_max"):
        check_half_of_the_adversarial_times_are_t_max()


# ---- the discriminator's two sides ---------------------------------------------------------------------------------


class DoubledPrompts(Distillation):
    """Misaligned pairs with the captions doubled once, for both sides."""

    def discriminate(self, x_t, t, real, z_disc, t_disc, w, batch, scale):
        with torch.no_grad():
            fake = self.one_step(x_t, t, w, batch, scale)
        (z_real, z_fake), (t_real, t_fake) = (a.split([COUNT, 2 * COUNT]) for a in (z_disc, t_disc))
        doubled = Batch(**vars(batch) | {k: torch.cat([getattr(batch, k)] * 2) for k in ("text", "mask")})
        on_real = self.judge(real, z_real, t_real, doubled, scale)
        on_fake = self.judge(torch.cat([fake, real.roll(1, 0)]), z_fake, t_fake, doubled, scale)
        return hinge_discriminator(on_real, torch.cat(on_fake.chunk(2), dim=1)).mean(), on_real.mean() - on_fake.mean()


class SharedTimes(Distillation):
    """The real side is re-noised to the times of the fake side."""

    def discriminate(self, x_t, t, real, z_disc, t_disc, w, batch, scale):
        return super().discriminate(x_t, t, real, z_disc, torch.cat([t_disc[COUNT : 2 * COUNT], t_disc[COUNT:]]), w, batch, scale)


def check_sides(losses: Distillation) -> None:
    """Each real latent is judged once, under its own caption, at a time of its own; misaligned ones under another's."""
    judged = []
    judge = losses.judge
    losses.judge = lambda x0, z, t, batch, scale: judged.append((x0, z, t, batch.text)) or judge(x0, z, t, batch, scale)
    losses.backward(1, Draws(0, 1), ToyCorpus())
    batch = ToyCorpus().draw(COUNT, Draws(0, 0))
    assert all(len({len(part) for part in call}) == 1 for call in judged), f"latents, noise, times and captions: {[[len(part) for part in call] for call in judged]}"
    x0, z, t, text = (torch.cat(parts) for parts in zip(*judged))
    same_picture = (x0[:, None] - batch.x0 * trigflow.SIGMA_DATA).abs().amax(dim=(2, 3, 4)) < 1e-6   # [judged, pictures]
    same_caption = (text[:, None] - batch.text).abs().amax(dim=(2, 3)) < 1e-6
    pairs = same_picture & same_caption
    assert torch.equal(pairs.sum(dim=0), torch.ones(COUNT, dtype=torch.long)), "each real pair is judged once"
    misaligned = same_picture.any(dim=1) & ~pairs.any(dim=1)
    assert misaligned.sum() == (COUNT if losses.config.ladd_misaligned else 0)
    assert len(x0) == (3 if losses.config.ladd_misaligned else 2) * COUNT
    assert len(t.unique()) == len(t), "two latents share their time"
    assert len(z.flatten(1).unique(dim=0)) == len(z), "two latents share their noise"


@pytest.mark.parametrize("misaligned", [False, True])
def test_each_real_pair_is_judged_once_with_draws_of_its_own(misaligned):
    check_sides(distillation(ladd_misaligned=misaligned))


@pytest.mark.parametrize("defect, misaligned, says", [(DoubledPrompts, True, "latents, noise, times and captions|size of tensor"), (SharedTimes, False, "share their time"),
                                                      (SharedTimes, True, "share their time")])
def test_the_check_of_the_sides_catches(defect, misaligned, says):
    with pytest.raises((AssertionError, RuntimeError), match=says):
        check_sides(distillation(defect, ladd_misaligned=misaligned))


def test_misaligned_pairs_teach_the_discriminator_the_caption():
    """Fakes equal to the real ones leave the caption as the only clue: with misaligned pairs the verdicts come to depend on it."""
    losses = distillation(ladd_misaligned=True)
    losses.one_step = lambda x_t, t, w, batch, scale: batch.x0 * trigflow.SIGMA_DATA
    opt = torch.optim.Adam(losses.disc.parameters(), 3e-3)
    for step in range(1, 81, 2):
        losses.backward(step, Draws(0, step), ToyCorpus())
        opt.step()
        opt.zero_grad()
    batch, t = ToyCorpus().draw(COUNT, Draws(0, 0)), torch.full((COUNT,), 0.3)
    with torch.no_grad():
        own, other = (losses.disc(batch.x0, t, text, batch.mask).mean() for text in (batch.text, batch.text.roll(1, 0)))
    assert own > other + 0.05


def test_misaligned_pairs_need_two_samples():
    losses = distillation(ladd_misaligned=True, micro_batches=COUNT)
    with pytest.raises(ValueError, match="at least 2 samples"):
        losses.backward(1, Draws(0, 1), ToyCorpus())


# ---- the explicit softmax ---------------------------------------------------------------------------------------


def check_network_is_the_shipped_one(put_on) -> None:
    """With the processors of the JVP on, the network gives what the stock one gives."""
    model = small_teacher().eval()
    net, batch = TrigFlowTeacher(model), ToyCorpus().draw(COUNT, Draws(0, 0))
    with torch.no_grad():
        before = net(batch.x0, torch.full((COUNT,), 0.7), batch.text, batch.mask)
        put_on(model)
        after = net(batch.x0, torch.full((COUNT,), 0.7), batch.text, batch.mask)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def softmax_everywhere(model: SanaTransformer2DModel) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(ExplicitSoftmaxAttnProcessor())


def test_the_explicit_softmax_leaves_the_linear_attention_alone():
    check_network_is_the_shipped_one(use_explicit_softmax)
    with pytest.raises(AssertionError, match="not close"):
        check_network_is_the_shipped_one(softmax_everywhere)
