"""Optimisers against their formulas, learning rates by layer, and accumulated gradients against those of the whole batch."""

import sys

import pytest
import torch

from sana_app.model.network import predict_flow
from toy_stage import tiny_sana
from training.config import Config
from training.flow import flow_loss, flow_path
from training.loop import Draws
from training.memory import OPTIMIZER_BYTES
from training.optim import Came, adamw, apply_gradients, layer_groups, learning_rate, make_optimizer


def test_came_follows_algorithm_2_of_its_paper():
    """One matrix, three steps, written as in arXiv 2307.02047: U = g/sqrt(V), clipped; m; S from (U - m)²; step m/sqrt(S)."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    theta, m = p.detach().clone(), torch.zeros(5, 3, dtype=torch.float64)
    r, c, R, C = (torch.zeros(n, dtype=torch.float64) for n in (5, 3, 5, 3))
    beta1, beta2, beta3, lr, decay = 0.9, 0.999, 0.9999, 1e-2, 0.1
    opt = Came([p], lr=lr, weight_decay=decay)
    for _ in range(3):
        g = torch.randn(5, 3, dtype=torch.float64)
        p.grad = g.clone()
        opt.step()
        r, c = beta2 * r + (1 - beta2) * (g ** 2 + 1e-30).mean(1), beta2 * c + (1 - beta2) * (g ** 2 + 1e-30).mean(0)
        U = g / (torch.outer(r, c) / r.mean()).sqrt()
        U = U / max(1.0, float(U.square().mean().sqrt()))
        m = beta1 * m + (1 - beta1) * U
        unstable = (U - m) ** 2 + 1e-16
        R, C = beta3 * R + (1 - beta3) * unstable.mean(1), beta3 * C + (1 - beta3) * unstable.mean(0)
        theta = theta - lr * decay * theta - lr * m / (torch.outer(R, C) / R.mean()).sqrt()
        torch.testing.assert_close(p.detach(), theta, rtol=1e-9, atol=1e-12)


def test_came_takes_a_convolution_for_a_matrix_and_half_of_adamws_memory():
    torch.manual_seed(0)
    flat, conv = (torch.nn.Parameter(torch.arange(512.0).sin().view(shape)) for shape in ((32, 16), (32, 16, 1, 1)))
    opt = Came([flat, conv], lr=1e-2)
    for _ in range(2):
        flat.grad = torch.randn(32, 16)
        conv.grad = flat.grad.view(32, 16, 1, 1).clone()
        opt.step()
    assert torch.equal(flat, conv.view(32, 16))
    kept = sum(v.numel() for v in opt.state[conv].values())
    assert kept == 512 + 2 * (32 + 16) and OPTIMIZER_BYTES["Came"] == 4


@pytest.mark.parametrize("name", ["adamw", "came", "adamw8bit"])
def test_an_optimiser_learns_and_goes_on_exactly_from_its_state(name, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = Config(optimizer=name, lr_warmup_steps=1)

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(80, 80)  # 6,400 weights: more than the 4,096 below which bitsandbytes keeps 32 bits
        return model, make_optimizer([(list(model.parameters()), 1e-2)], config)

    def train(model, opt, steps: range) -> float:
        for step in steps:
            x = Draws(0, step).normal(16, 80)
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            apply_gradients(opt, step, 60, 1.0, config, loss.item())
        return loss.item()

    model, opt = start()
    first = train(model, opt, range(1))
    train(model, opt, range(1, 30))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    last = train(model, opt, range(30, 60))
    assert last < 0.8 * first
    again, opt_again = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    opt_again.load_state_dict(state["opt"])
    train(again, opt_again, range(30, 60))
    assert torch.equal(again.weight, model.weight)
    if name == "adamw8bit":
        assert opt.state[model.weight]["state1"].dtype == torch.uint8 and OPTIMIZER_BYTES["AdamW8bit"] == 2


def test_eight_bits_stay_near_thirty_two():
    pytest.importorskip("bitsandbytes")
    weights = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        model, config = torch.nn.Linear(80, 80), Config(optimizer=name, lr_warmup_steps=1)
        start, opt = model.weight.detach().clone(), make_optimizer([(list(model.parameters()), 1e-3)], config)
        for step in range(20):
            x = Draws(1, step).normal(16, 80)
            (model(x) - x.flip(1)).square().mean().backward()
            apply_gradients(opt, step, 20, 1.0, config)
        weights[name] = model.weight.detach() - start
    away = (weights["adamw8bit"] - weights["adamw"]).norm() / weights["adamw"].norm()
    assert 0 < away < 0.05


def test_a_missing_library_and_an_unknown_optimiser_are_named(monkeypatch):
    params = [([torch.nn.Parameter(torch.zeros(2))], 1e-3)]
    with pytest.raises(ValueError, match="'lion': known are adamw, adamw8bit, came"):
        make_optimizer(params, Config(optimizer="lion"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="pip install --no-deps 'bitsandbytes>=0.50', or take optimizer=came"):
        make_optimizer(params, Config(optimizer="adamw8bit"))


def test_cross_attention_and_norms_learn_at_their_own_rates():
    model = tiny_sana()
    model.patch_embed.requires_grad_(False)
    config = Config(lr_cross_attention=2.0, lr_norms=5.0, lr_rest=0.5, lr_warmup_steps=1)
    rates = {id(p): lr for params, lr in layer_groups(model, 1e-3, config) for p in params}
    names = dict(model.named_parameters())
    expected = {"transformer_blocks.0.attn2.to_k.bias": 2e-3, "transformer_blocks.1.attn2.norm_q.weight": 5e-3, "caption_norm.weight": 5e-3,
                "transformer_blocks.1.attn1.to_q.weight": 5e-4, "proj_out.bias": 5e-4, "scale_shift_table": 5e-4}
    assert {name: rates[id(names[name])] for name in expected} == pytest.approx(expected)
    assert len(rates) == sum(p.requires_grad for p in names.values())
    # the schedule keeps the ratios
    opt = make_optimizer(layer_groups(model, 1e-3, config), config)
    for p in names.values():
        p.grad = torch.ones_like(p)
    apply_gradients(opt, 5, 10, 1.0, config)
    assert {g["lr"] for g in opt.param_groups} == {learning_rate(peak, 5, 10, config) for peak in (2e-3, 5e-3, 5e-4)}


def test_equal_rates_keep_one_group_in_the_modules_order():
    model = tiny_sana()
    (params, lr), = layer_groups(model, 1e-3, Config())
    assert lr == 1e-3 and all(a is b for a, b in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_micro_batches_give_the_gradients_of_one(checkpointing):
    def gradients(parts: int) -> dict[str, torch.Tensor]:
        model = tiny_sana()
        if checkpointing and parts == 2:
            model.enable_gradient_checkpointing()
        for draws in Draws(0, 3).parts(parts):
            count = 8 // parts
            x0, z, s, text = (f(*shape).double() for f, shape in ((draws.normal, (count, 4, 4, 4)), (draws.normal, (count, 4, 4, 4)),
                                                                 (draws.uniform, (count,)), (draws.normal, (count, 3, 12))))
            (flow_loss(predict_flow(model, flow_path(x0, z, s), s, text), x0, z).mean() / parts).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients(2), gradients(1), rtol=1e-9, atol=1e-12)


def test_a_skipped_step_leaves_weights_and_optimiser_alone():
    p = torch.nn.Parameter(torch.ones(3))
    config = Config(lr_warmup_steps=1)
    opt = adamw([([p], 1e-2)], config)
    for grad, loss in ((torch.full((3,), float("nan")), 1.0), (torch.ones(3), float("nan")), (torch.ones(3), float("inf"))):
        p.grad = grad
        assert apply_gradients(opt, 0, 10, 1.0, config, loss)["skipped"] == 1
        assert torch.equal(p.detach(), torch.ones(3)) and not opt.state and p.grad is None
    p.grad = torch.ones(3)
    assert apply_gradients(opt, 0, 10, 1.0, config, 1.0)["skipped"] == 0 and p[0] < 1
