"""The benchmark of the distillation step compares like with like, and measures both ways."""

import pytest
import torch

from training import bench_scm
from training.bench_scm import PARTS, WAYS, SpreadBiasAttention, compare, measure_all, table
from training.losses import jvp_of_student, tangent_directions

SMALL = dict(heads=1, layers=2, batch=2, side=2, tokens=4)


@pytest.mark.parametrize("part", PARTS)
def test_both_ways_give_the_same_loss_and_gradients(part):
    assert compare(SMALL, part) != 0


@pytest.mark.parametrize("part", PARTS)
def test_the_comparison_notices_another_sum(part, monkeypatch):
    monkeypatch.setattr(bench_scm, "tangent_directions", lambda dxdt, t: [0.9 * v for v in tangent_directions(dxdt, t)])
    with pytest.raises(AssertionError, match="not close"):
        compare(SMALL, part)


def test_the_spread_bias_is_the_same_attention():
    losses, case = bench_scm.build(**SMALL)
    call = lambda: losses.student(case.x_t, case.t, case.batch.text, case.batch.mask, guidance=case.w)
    with torch.no_grad():
        before = call()
        bench_scm.spread_bias(losses.student)
        assert isinstance(losses.student.transformer.transformer_blocks[0].attn2.processor, SpreadBiasAttention)
        torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)


def test_dual_numbers_are_the_jvp():
    losses, case = bench_scm.build(**SMALL)
    torch.nn.init.normal_(losses.student.transformer.proj_out.weight, std=0.3)
    function = lambda x, t: losses.student(x, t, case.batch.text, case.batch.mask, guidance=case.w)
    dxdt = torch.randn(case.x_t.shape, generator=torch.Generator().manual_seed(0))
    ours = jvp_of_student(function, case.x_t, case.t, dxdt)
    with torch.no_grad():
        theirs = torch.func.jvp(function, (case.x_t, case.t), tangent_directions(dxdt, case.t))
    for a, b in zip(ours, theirs):
        assert not a.requires_grad and a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    constant = jvp_of_student(lambda x, t: torch.ones(2, 4, 2, 2), case.x_t, case.t, dxdt)
    assert torch.equal(constant[1], torch.zeros(2, 4, 2, 2))


def test_the_benchmark_runs_and_prints_its_table():
    found = measure_all(SMALL, rounds=1, repeat=2, threads=1, precision="fp32")
    assert found.keys() == PARTS.keys()
    for ways in found.values():
        assert set(ways) == set(WAYS)
        assert all(numbers["wall_s"] > 0 and numbers["cpu_s"] > 0 and numbers["peak_mib"] > numbers["added_mib"] >= 0 for numbers in ways.values())
    text = table(found)
    assert all(name in text for name in PARTS.values()) and text.count("ours / public") == 1 and len(text.splitlines()) == 1 + 5 * len(PARTS)
