"""Curves: written by default, resumed without a fold, and a tracker that is not there is named."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.config import Config
from training.loop import Draws, run
from training.optim import adamw, apply_gradients
from training.tracker import open_tracker


def train(out, steps: int, **settings) -> None:
    torch.manual_seed(0)
    config = Config(preview_steps=5, save_minutes=0.0, **settings)
    model = torch.nn.Linear(4, 1)
    opt = adamw([(list(model.parameters()), 1e-2)], config)

    def train_step(step: int, draws: Draws) -> dict[str, float]:
        loss = model(draws.normal(8, 4)).square().mean()
        loss.backward()
        return {"loss": loss.item(), **apply_gradients(opt, step, steps, 1.0, config, loss.item())}

    run("line", out, config, steps, {"model": model, "opt": opt}, train_step, 8, preview=lambda step, folder: {"score": float(step)})


def curves(out) -> dict[str, list[int]]:
    """Tag -> steps, of all that TensorBoard shows of stage `line`."""
    events = EventAccumulator(str(out / "tensorboard" / "line"))
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_every_number_and_a_resumed_run_goes_on(tmp_path):
    train(tmp_path, 12)
    assert {"loss", "grad_norm", "skipped", "images_per_s", "peak_gib"} <= set(curves(tmp_path))
    assert curves(tmp_path)["val/score"] == [5, 10, 12] and curves(tmp_path)["loss"] == [0, 1, 10, 11]
    train(tmp_path, 22)
    assert curves(tmp_path)["loss"] == [0, 1, 10, 11, 20, 21]


def test_without_a_tracker_nothing_is_written(tmp_path):
    train(tmp_path, 2, tracker="none")
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("name, message", [("abacus", "tracker='abacus'.*tensorboard.*wandb"), ("clearml", "tracker=clearml: its package is not installed: pip install clearml")])
def test_a_tracker_that_is_not_there_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        open_tracker("line", tmp_path, Config(tracker=name), 0)
