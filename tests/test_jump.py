"""The jump stage: the teacher's paths are what its sampler walks, drawn once, and the student learns to jump to their ends."""

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pictures import start_distillation, write_shards
from sana_app.model import trigflow
from training import trajectories
from training.batches import Corpus
from training.config import Config
from training.jump import train_jump
from training.loop import Draws
from training.pair import load_jump, start_pair
from training.sampling import guided_F, sample_student, sample_teacher, teacher_guidance
from training.student import train_student
from training.trajectories import GROUP, make_trajectories, trajectory_loss


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Config, Path]:
    root = tmp_path_factory.mktemp("jump")
    write_shards(root / "data", 24, 24)
    write_shards(root / "data", 8, 8, "val")
    return start_distillation(root, root / "data", noise_scale=0.8, jump_paths=2 * GROUP, jump_steps=60, jump_batch=16, jump_lr=2e-3)


@pytest.fixture(scope="module")
def corpus(run):
    return Corpus(run[0], run[1], "train")


@pytest.fixture(scope="module")
def teacher(run):
    return start_pair(*run)[0]


@pytest.fixture(scope="module")
def paths(run, corpus, teacher):
    return make_trajectories(run[0], corpus, teacher, None, run[1] / "cache")


def draw(paths, corpus, count: int, number: int = 0, rank: int = 0, world: int = 1):
    return paths.draw(count, Draws(5, number, rank, world), corpus)


def test_a_path_is_the_samplers_and_its_points_lie_on_it(run, corpus, teacher, paths):
    config, steps = run[0], run[0].jump_path_steps
    assert paths.states.shape == (2 * GROUP, steps + 1, 8, 4, 4)
    which = np.arange(0, 2 * GROUP, 7)
    states = torch.from_numpy(paths.states[which].astype(np.float32))
    batch = corpus.gather(paths.rows[which], paths.inks[which], [paths.captions[i] for i in which])
    w, scale = torch.from_numpy(paths.w[which]), torch.from_numpy(paths.scale[which])
    end = sample_teacher(teacher, batch, states[:, 0], steps, teacher_guidance(config, w).view(-1, 1, 1, 1), scale)
    torch.testing.assert_close(states[:, -1], end, rtol=0, atol=1e-2 * float(end.abs().max()))  # kept in half precision
    # from each state the ODE, walked from there alone, goes to the same end
    times = trigflow.ode_timesteps(steps)
    for k in range(steps):
        x = states[:, k] * trigflow.SIGMA_DATA
        for t, u in zip(times[k:-1], times[k + 1:]):
            F = guided_F(teacher, x / trigflow.SIGMA_DATA, torch.full((len(x),), t), batch, teacher_guidance(config, w), scale)
            x = trigflow.ode_step(x, F, t, u)
        torch.testing.assert_close(x.detach() / trigflow.SIGMA_DATA, states[:, -1], rtol=0, atol=1e-2 * float(end.abs().max()))
    # noise of full strength, or of what the exported model starts from
    spread = torch.from_numpy(paths.states[:][:, 0].astype(np.float32)).flatten(1).std(dim=1)
    assert ((spread - 1).abs().minimum((spread - config.noise_scale).abs()) < 0.2).all() and 0.82 < float(spread.mean()) < 0.98
    assert set(paths.w) == set(config.guidance) and set(paths.scale) == {0.0, 1.0}


def test_a_batch_has_points_of_paths_at_their_times(paths, corpus):
    seen = set()
    for number in range(8):
        batch, x, t, x0, w, scale = draw(paths, corpus, 16, number)
        for i in range(16):
            of_end = np.flatnonzero((paths.states[:][:, -1] == x0[i].numpy().astype(np.float16)).all(axis=(1, 2, 3)))
            assert len(of_end) == 1
            path = paths.states[int(of_end[0])]
            point = int(np.flatnonzero((path == x[i].numpy().astype(np.float16)).all(axis=(1, 2, 3)))[0])
            assert float(t[i]) == pytest.approx(math.pi / 2 * (1 - point / 6)) and batch.captions[i] == paths.captions[int(of_end[0])]
            seen.add(point)
    assert seen == set(range(6))  # from noise to the last point before the end, never the end itself


def test_two_processes_share_one_batch(paths, corpus):
    whole = draw(paths, corpus, 8)
    halves = [draw(paths, corpus, 4, rank=rank, world=2) for rank in range(2)]
    for i, name in enumerate(("x", "t", "x0", "w", "scale"), start=1):
        assert torch.equal(whole[i], torch.cat([half[i] for half in halves])), name
    assert whole[0].captions == halves[0][0].captions + halves[1][0].captions


def test_what_was_drawn_is_not_drawn_again_and_a_gap_is_filled_with_the_same(run, corpus, teacher, paths, monkeypatch):
    before, (folder,) = paths.states[:].copy(), (run[1] / "cache").glob("trajectories-*")
    shutil.rmtree(folder / "00001")
    drawn, write = [], trajectories._write_group
    monkeypatch.setattr(trajectories, "_write_group", lambda *a: (drawn.append(a[4]), write(*a)))
    again = make_trajectories(run[0], corpus, teacher, None, run[1] / "cache")
    assert drawn == [1] and np.array_equal(again.states[:], before)
    # what shapes a path makes other paths: settings, the teacher's weights, a weak teacher
    for number, other in enumerate([dict(jump_path_steps=2), dict(toned_weight=0.5), dict(guidance=(2.0,)), dict(balance="x")]):
        make_trajectories(replace(run[0], jump_paths=1, **other), corpus, teacher, None, run[1] / "cache")
        assert drawn == [1] + [0] * (number + 1), other
    changed = copy.deepcopy(teacher)
    next(changed.parameters()).data.add_(1e-3)
    make_trajectories(replace(run[0], jump_paths=1), corpus, changed, None, run[1] / "cache")
    make_trajectories(replace(run[0], jump_paths=1), corpus, teacher, changed, run[1] / "cache")
    assert drawn == [1] + [0] * 6


def test_paths_that_half_precision_cannot_hold_are_not_kept(run, corpus, teacher, tmp_path):
    with pytest.raises(FloatingPointError, match="group 0 is not finite"):
        make_trajectories(replace(run[0], guidance=(1e9,), jump_paths=1), corpus, teacher, None, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.name == "00000"]


def test_a_dry_run_walks_no_path(run, corpus, tmp_path):
    paths = make_trajectories(replace(run[0], dry_run=True), corpus, None, None, tmp_path)
    assert paths.states.shape == (GROUP, 7, 8, 4, 4) and not list(tmp_path.iterdir())
    assert draw(paths, corpus, 4)[1].shape == (4, 8, 4, 4)


def test_the_loss_is_zero_for_the_jump_that_hits_the_end_alone():
    draws, sigma = Draws(0, 0), trigflow.SIGMA_DATA
    x, x0, t = draws.normal(6, 4, 3, 3), draws.normal(6, 4, 3, 3), torch.linspace(0.2, math.pi / 2, 6)
    exact = lambda x, t: (torch.cos(t).view(-1, 1, 1, 1) * x - x0) / torch.sin(t).view(-1, 1, 1, 1)
    assert trajectory_loss(exact, x, t, x0).max() < 1e-6
    off = lambda x, t: exact(x, t) + 1  # by sin t, of which smooth L1 takes 0.05 away
    torch.testing.assert_close(trajectory_loss(off, x, t, x0), torch.sin(t) - 0.05, rtol=1e-4, atol=1e-5)
    assert sigma == 0.5


def test_the_stage_brings_one_step_nearer_to_the_teachers_end_and_the_student_goes_on_from_it(run, teacher, monkeypatch):
    config, out = run
    with pytest.raises(ValueError, match="no transformer at .*jump: run the jump stage first, or set jump_paths=0"):
        train_student(config, out)
    train_jump(config, out)
    held_out = Corpus(config, out, "val")
    batch = held_out.fixed(8)
    noise = 0.8 * Draws(7, 0).normal(*batch.x0.shape)
    end = sample_teacher(teacher, batch, noise, config.jump_path_steps, float(teacher_guidance(config, torch.tensor(4.5))))
    start, jumped = start_pair(config, out)[1], start_pair(config, out)[1]
    load_jump(config, out, jumped)
    distance = lambda student: float((sample_student(student, batch, [noise], 4.5) - end).abs().mean())
    assert distance(jumped) < 0.8 * distance(start)
    first = {}
    monkeypatch.setattr("training.student.load_jump", lambda c, o, student: (load_jump(c, o, student), first.update({k: v.clone() for k, v in student.state_dict().items()})))
    train_student(replace(config, jump_weight=1.0), out)
    assert all(torch.equal(first[k], v) for k, v in jumped.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(start_pair(config, out)[0].parameters(), teacher.parameters(), strict=True))  # the teacher stays as it is


def test_without_paths_there_is_no_such_stage(run, tmp_path, capsys):
    train_jump(replace(run[0], jump_paths=0), tmp_path)
    assert "starts as its teacher" in capsys.readouterr().out and not list(tmp_path.iterdir())
