"""The explicit softmax and the token convolutions compute what the stock modules compute, and can be differentiated forwards."""

import copy

import pytest
import torch
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaAttnProcessor2_0
from layouts import CAPTION_CHANNELS, randomised, tiny_controlnet, tiny_transformer
from peft import LoraConfig
from torch.testing import assert_close

from sana_app.model.attention import ExplicitSoftmaxAttnProcessor, use_explicit_softmax
from sana_app.model.fast import TokenGLUMBConv, use_token_convolutions
from sana_app.model.network import predict_F

CLOSE = dict(rtol=0, atol=1e-5)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 6)
    mask[1, 3:] = 0
    return dict(
        hidden_states=torch.randn(2, 8, 4, 6, generator=g),
        encoder_hidden_states=torch.randn(2, 6, CAPTION_CHANNELS, generator=g),
        encoder_attention_mask=mask,
        timestep=torch.tensor([0.3, 1.0]),
        guidance=torch.tensor([0.45, 0.4]),
    )


def outputs(model, inputs):
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("change", [use_explicit_softmax, use_token_convolutions])
@pytest.mark.parametrize("qk_norm", ["rms_norm_across_heads", None])
def test_changed_model_equals_the_stock_model_and_back(change, qk_norm, inputs):
    model = tiny_transformer(qk_norm=qk_norm)
    keys, stock = list(model.state_dict()), outputs(model, inputs)
    assert change(model) == len(model.transformer_blocks)
    assert list(model.state_dict()) == keys
    assert_close(outputs(model, inputs), stock, **CLOSE)
    assert change(model, enabled=False) == len(model.transformer_blocks)
    assert_close(outputs(model, inputs), stock, rtol=0, atol=0)
    assert {type(b.attn2.processor) for b in model.transformer_blocks} == {SanaAttnProcessor2_0}
    assert {type(b.ff) for b in model.transformer_blocks} == {GLUMBConv}


@pytest.mark.parametrize("change", [use_explicit_softmax, use_token_convolutions])
def test_gradients_equal_the_stock_gradients(change, inputs):
    stock = tiny_transformer()
    changed = copy.deepcopy(stock)
    change(changed)
    for model in (stock, changed):
        outputs(model, inputs).square().mean().backward()
    assert all(p.grad is not None for p in changed.parameters())
    for (name, a), b in zip(stock.named_parameters(), changed.parameters()):
        assert_close(b.grad, a.grad, **CLOSE, msg=lambda m: f"{name}: {m}")


def test_only_cross_attention_is_changed():
    model = tiny_controlnet(tiny_transformer())
    use_explicit_softmax(model)
    for block in model.transformer_blocks:
        assert isinstance(block.attn2.processor, ExplicitSoftmaxAttnProcessor)
        assert not isinstance(block.attn1.processor, ExplicitSoftmaxAttnProcessor)


def test_masked_text_has_no_influence(inputs):
    model = tiny_transformer()
    use_explicit_softmax(model)
    before = outputs(model, inputs)
    inputs["encoder_hidden_states"][1, 3:] += 1.0
    assert_close(outputs(model, inputs), before, rtol=0, atol=1e-6)
    inputs["encoder_hidden_states"][1, 2] += 1.0
    assert (outputs(model, inputs)[1] - before[1]).abs().max() > 1e-4


def test_softmax_stays_in_float32_under_autocast():
    """Large equal scores: in bfloat16 the sum over 300 keys would round, in float32 the mean of the values is exact."""
    model = tiny_transformer()
    attn = model.transformer_blocks[0].attn2
    for linear in (attn.to_q, attn.to_k):
        torch.nn.init.constant_(linear.bias, 3.0)
        torch.nn.init.zeros_(linear.weight)
    hidden, text = torch.randn(1, 4, 32), torch.randn(1, 300, 32)
    attn.to_out[0] = torch.nn.Identity()
    attn.set_processor(ExplicitSoftmaxAttnProcessor())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        value = attn.to_v(text).float()
        out = attn(hidden, encoder_hidden_states=text)
    assert_close(out.float(), value.mean(1, keepdim=True).expand(-1, 4, -1), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("norm_type", [None, "rms_norm"])
@pytest.mark.parametrize("residual", [True, False])
def test_token_convolution_equals_every_variant_of_the_stock_module(norm_type, residual):
    stock = randomised(GLUMBConv(8, 8, 2.5, norm_type=norm_type, residual_connection=residual))
    fast = copy.deepcopy(stock)
    fast.__class__ = TokenGLUMBConv
    x = torch.randn(3, 8, 5, 7)
    assert_close(fast(x), stock(x), **CLOSE)


def test_lora_on_the_convolutions_still_counts(inputs):
    model = tiny_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["conv_inverted", "conv_point"], init_lora_weights=False))
    stock = outputs(model, inputs)
    use_token_convolutions(model)
    assert_close(outputs(model, inputs), stock, **CLOSE)


def test_jvp_equals_a_central_difference(inputs):
    """Through ControlNet and transformer, along x and t, as the sCM loss takes it."""
    transformer = tiny_transformer()
    controlnet = tiny_controlnet(transformer)
    for model in (transformer, controlnet):
        assert use_explicit_softmax(model) and use_token_convolutions(model)
        model.requires_grad_(False)
    x, text, mask = (inputs[k] for k in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask"))
    g = torch.Generator().manual_seed(1)
    cond, dx = (torch.randn(x.shape, generator=g) for _ in range(2))
    t, dt = torch.tensor([0.4, 1.2]), torch.tensor([0.5, -0.3])

    def F(x, t):
        return predict_F(transformer, x, t, text, mask, 4.5, controlnet, cond)

    value, derivative = torch.func.jvp(F, (x, t), (dx, dt))
    assert_close(value, F(x, t), rtol=0, atol=1e-6)
    h = 1e-3  # small, because the ReLU of the linear attention has kinks
    central = (F(x + h * dx, t + h * dt) - F(x - h * dx, t - h * dt)) / (2 * h)
    assert_close(derivative, central, rtol=0, atol=2e-3 * central.abs().max().item())
