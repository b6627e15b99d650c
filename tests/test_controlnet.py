"""The Sprint ControlNet, its start from a transformer, and the way from a flow teacher to a Sprint student."""

import logging

import pytest
import torch
from diffusers import SanaTransformer2DModel
from layouts import CAPTION_CHANNELS, PUBLISHED_TRANSFORMER_CONFIG, tiny_controlnet, tiny_transformer
from torch.testing import assert_close

from sana_app.model import trigflow
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.convert import sprint_from_teacher
from sana_app.model.network import TrigFlowTeacher, network_time, predict_F, predict_flow

EXACT = dict(rtol=0, atol=0)


def tiny_teacher(**overrides):
    return tiny_transformer(guidance_embeds=False, **overrides)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 5)
    mask[1, 2:] = 0
    return dict(
        x=torch.randn(2, 8, 4, 4, generator=g),
        text=torch.randn(2, 5, CAPTION_CHANNELS, generator=g),
        mask=mask,
        cond=torch.randn(2, 8, 4, 4, generator=g),
    )


def F(model, batch, t=(0.7, 1.3), guidance=4.5, controlnet=None, scale=1.0):
    return predict_F(
        model, batch["x"], torch.tensor(t), batch["text"], batch["mask"], guidance, controlnet, batch["cond"], scale
    )


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_fresh_controlnet_changes_nothing(guidance_embeds, batch):
    model = tiny_transformer(guidance_embeds=guidance_embeds)
    controlnet = SanaSprintControlNetModel.from_transformer(model, 3)
    assert_close(F(model, batch, controlnet=controlnet), F(model, batch), **EXACT)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_copies_every_shared_weight_and_config_value(guidance_embeds):
    model = tiny_transformer(guidance_embeds=guidance_embeds, qk_norm="rms_norm_across_heads")
    controlnet = SanaSprintControlNetModel.from_transformer(model, 3)
    source = model.state_dict()
    own = {k for k in controlnet.state_dict() if k not in source}
    assert own and all(k.startswith(("input_block.", "controlnet_blocks.")) for k in own)
    for name, value in controlnet.state_dict().items():
        assert_close(value, source.get(name, torch.zeros_like(value)), **EXACT)
    copied = ("qk_norm", "guidance_embeds", "guidance_embeds_scale", "timestep_scale", "caption_channels", "sample_size")
    assert {k: controlnet.config[k] for k in copied} == {k: model.config[k] for k in copied}
    assert controlnet.config.num_layers == 3


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_the_published_1_6b_shape_fits(guidance_embeds):
    """On the meta device: nothing in copying or converting depends on the small sizes of the other tests."""
    config = {k: v for k, v in PUBLISHED_TRANSFORMER_CONFIG.items() if k[0] != "_"}
    with torch.device("meta"):
        model = SanaTransformer2DModel(**config | dict(guidance_embeds=guidance_embeds))
        controlnet = SanaSprintControlNetModel.from_transformer(model, 7)
        if not guidance_embeds:
            model, controlnet = sprint_from_teacher(model), sprint_from_teacher(controlnet)
    size, control_size = (sum(p.numel() for p in m.parameters()) for m in (model, controlnet))
    assert round(size / 1e9, 1) == 1.6 and round(control_size / 1e9, 1) == 0.6
    assert len(controlnet.transformer_blocks) == len(controlnet.controlnet_blocks) == 7


def test_without_copying_the_weights_are_its_own():
    model = tiny_transformer()
    controlnet = SanaSprintControlNetModel.from_transformer(model, 2, load_weights_from_transformer=False)
    assert (controlnet.patch_embed.proj.weight != model.patch_embed.proj.weight).any()
    assert not controlnet.input_block.weight.any()


def test_every_weight_of_a_fresh_controlnet_can_start_to_learn(batch):
    """The zero layers learn first and then pass gradients on: after three steps nothing is cut off."""
    model = tiny_transformer().requires_grad_(False)
    controlnet = SanaSprintControlNetModel.from_transformer(model, 3)
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (F(model, batch, controlnet=controlnet) - batch["cond"]).square().mean().backward()
        optimizer.step()
    assert [n for n, p in controlnet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_lines_guidance_time_and_strength_all_matter(batch):
    model = tiny_transformer()
    controlnet = tiny_controlnet(model)

    def residuals(cond=batch["cond"], s=(0.2, 0.9), guidance=0.45, scale=1.0):
        return torch.stack(
            controlnet(
                batch["x"], batch["text"], torch.tensor(s), cond, scale, torch.full((2,), guidance), batch["mask"]
            ).controlnet_block_samples
        )

    base = residuals()
    assert base.shape == (2, 2, 16, 32)
    for changed in (residuals(cond=-batch["cond"]), residuals(s=(0.3, 0.8)), residuals(guidance=0.1)):
        assert (changed - base).abs().max() > 1e-3
    assert_close(residuals(scale=0.5), base * 0.5, **EXACT)
    assert not residuals(scale=0.0).any()
    each = residuals(scale=torch.tensor([0.0, 1.0]))
    assert not each[:, 0].any()
    assert_close(each[:, 1], base[:, 1], **EXACT)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_copied_blocks_compute_what_the_base_blocks_compute(guidance_embeds, batch):
    """Blind to the lines and with identity outputs, residual i is the output of base block i - 1, padding left out."""
    model = tiny_transformer(guidance_embeds=guidance_embeds)
    controlnet = SanaSprintControlNetModel.from_transformer(model, 3)
    for block in controlnet.controlnet_blocks:
        torch.nn.init.eye_(block.weight)
    outputs, residuals = [], []
    for net, store in ((model.transformer_blocks, outputs), (controlnet.controlnet_blocks, residuals)):
        for block in net:
            block.register_forward_hook(lambda m, i, o, store=store: store.append(o))
    given = []
    model.register_forward_pre_hook(lambda m, i, kw: given.extend(kw["controlnet_block_samples"]), with_kwargs=True)
    F(model, batch, controlnet=controlnet)
    assert len(given) == 3
    # only the first two base blocks are untouched by a residual
    for i in range(2):
        assert_close(given[i], outputs[i], rtol=0, atol=1e-6)
    assert_close(torch.stack(given), torch.stack(residuals), **EXACT)

    batch["text"][1, 2:] += 1.0  # where the mask is 0
    before = given.copy()
    given.clear()
    F(model, batch, controlnet=controlnet)
    assert_close(given, before, rtol=0, atol=1e-6)


def test_residual_i_enters_after_block_i(batch):
    """Blocks 0 and 1 never see the sketch (their output may be cached), block 2 does."""
    model = tiny_transformer()
    controlnet = tiny_controlnet(model)
    seen = {True: [], False: []}
    for with_lines in (True, False):
        hooks = [
            b.register_forward_hook(lambda m, i, o, store=seen[with_lines]: store.append(o))
            for b in model.transformer_blocks
        ]
        F(model, batch, controlnet=controlnet if with_lines else None)
        for hook in hooks:
            hook.remove()
    different = [(a != b).any().item() for a, b in zip(seen[True], seen[False])]
    assert different == [False, False, True, True]


def test_save_load_gives_the_same_residuals(tmp_path, batch):
    model = tiny_transformer()
    controlnet = tiny_controlnet(model)
    controlnet.save_pretrained(tmp_path)
    loaded = SanaSprintControlNetModel.from_pretrained(tmp_path)
    assert dict(loaded.config).keys() >= {"qk_norm", "guidance_embeds", "timestep_scale"}
    assert_close(F(model, batch, controlnet=loaded), F(model, batch, controlnet=controlnet), **EXACT)


def test_gradient_checkpointing_gives_the_same_gradients(batch):
    model = tiny_transformer()
    gradients = []
    for checkpointing in (False, True):
        controlnet = tiny_controlnet(model)
        if checkpointing:
            controlnet.enable_gradient_checkpointing()
        assert controlnet.gradient_checkpointing == checkpointing
        F(model, batch, controlnet=controlnet).square().mean().backward()
        gradients.append([p.grad for p in controlnet.parameters()])
    assert_close(gradients[1], gradients[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_refuses_more_blocks_than_the_transformer_reads(num_layers):
    with pytest.raises(ValueError, match="takes 1 to 3"):
        SanaSprintControlNetModel.from_transformer(tiny_transformer(), num_layers)


def test_refuses_missing_or_needless_guidance_and_wrong_condition_size(batch):
    inputs = (batch["x"], batch["text"], torch.rand(2))
    sprint, teacher = (tiny_controlnet(tiny_transformer(guidance_embeds=g)) for g in (True, False))
    with pytest.raises(ValueError, match="guidance was missing"):
        sprint(*inputs, batch["cond"])
    with pytest.raises(ValueError, match="guidance was given"):
        teacher(*inputs, batch["cond"], guidance=torch.ones(2))
    with pytest.raises(ValueError, match="wanted"):
        teacher(*inputs, batch["cond"][..., :2])


# ---- teacher -> student -----------------------------------------------------------------------------------------


def times_seen(model, call):
    """What the sinusoidal embedding of a model is fed during the call."""
    module = model.time_embed.time_proj if model.config.guidance_embeds else model.time_embed.emb.time_proj
    seen = []
    hook = module.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    call()
    hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("overrides, factor", [
    (dict(), 1.0),
    (dict(timestep_scale=1.0), 1.0),
    (dict(guidance_embeds=False), 1.0),
    (dict(guidance_embeds=False, timestep_scale=1.0), 1000.0),
])  # fmt: skip
def test_time_embedding_is_fed_the_flow_time(overrides, factor, batch):
    """s in [0, 1] for Sprint models and teachers, s * 1000 for base SANA; model and ControlNet alike."""
    model = tiny_transformer(**overrides)
    controlnet = tiny_controlnet(model)
    t = torch.tensor([0.0, trigflow.T_MAX])
    expected = torch.tensor([[0.0, factor]])
    for net in (model, controlnet):
        seen = times_seen(net, lambda: F(model, batch, t=t.tolist(), controlnet=controlnet))
        assert_close(seen, expected, rtol=1e-6, atol=1e-6)
    s = trigflow.flow_time(torch.linspace(0, trigflow.T_MAX, 50))
    assert network_time(s, model.config).max() <= factor * (1 + 1e-6)


def test_wrapped_teacher_and_plain_teacher_end_at_the_same_picture(batch):
    """Flow Euler on the raw teacher and TrigFlow Euler on the wrapped one: the distance shrinks like 1/n."""
    model = tiny_teacher()
    controlnet = tiny_controlnet(model)
    wrapped = TrigFlowTeacher(model, controlnet)
    condition = (batch["text"], batch["mask"])

    @torch.no_grad()
    def flow_euler(n):
        x = batch["x"]
        for i in range(n):
            s = torch.full((2,), 1 - i / n)
            x = x - predict_flow(model, x, s, *condition, None, controlnet, batch["cond"]) / n
        return x

    @torch.no_grad()
    def trigflow_euler(n, sigma=trigflow.SIGMA_DATA):
        x, times = sigma * batch["x"], trigflow.ode_timesteps(n)
        for t, u in zip(times[:-1], times[1:]):
            x = trigflow.ode_step(x, wrapped(x / sigma, torch.full((2,), t), *condition, batch["cond"]), t, u, sigma)
        return x / sigma

    moved = (flow_euler(48) - batch["x"]).abs().max()
    coarse, fine = ((flow_euler(n) - trigflow_euler(n)).abs().max() for n in (16, 48))
    assert moved > 0.5 and fine < 0.03 * moved and fine < coarse / 2, (moved, coarse, fine)


def test_fresh_student_equals_its_teacher_at_every_guidance(batch):
    teacher = tiny_teacher()
    teacher_controlnet = tiny_controlnet(teacher)
    student, controlnet = sprint_from_teacher(teacher), sprint_from_teacher(teacher_controlnet)
    assert student.config.guidance_embeds and controlnet.config.guidance_embeds
    expected = F(teacher, batch, guidance=None, controlnet=teacher_controlnet)
    for guidance in (1.0, 4.5, torch.tensor([4.0, 5.0])):
        assert_close(F(student, batch, guidance=guidance, controlnet=controlnet), expected, **EXACT)


def test_guidance_embedder_can_learn(batch):
    student = sprint_from_teacher(tiny_teacher())
    embedder = student.time_embed.guidance_embedder
    assert embedder.linear_1.weight.any() and not embedder.linear_2.weight.any() and not embedder.linear_2.bias.any()
    optimizer = torch.optim.SGD(embedder.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        F(student, batch).square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in embedder.parameters())


def test_conversion_names_what_it_added(caplog):
    with caplog.at_level(logging.WARNING):
        sprint_from_teacher(tiny_teacher())
    assert "time_embed.guidance_embedder.linear_1.weight" in caplog.text and "norm_q" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        student = sprint_from_teacher(tiny_teacher(qk_norm=None))
    assert "transformer_blocks.0.attn1.norm_q.weight" in caplog.text
    assert student.config.qk_norm == "rms_norm_across_heads"
    assert_close(student.transformer_blocks[0].attn2.norm_k.weight.data, torch.ones(32), **EXACT)


def test_conversion_refuses_a_teacher_with_other_times():
    with pytest.raises(ValueError, match="timestep_scale"):
        sprint_from_teacher(tiny_teacher(timestep_scale=1.0))
    with pytest.raises(ValueError, match="already embeds guidance"):
        sprint_from_teacher(tiny_transformer())
