"""Several processes train what one would: equal gradients and weights, with and without FSDP2, and checkpoints for any number of them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from toy_stage import work
from training.config import Config, load_config
from training.distributed import refuse_fsdp
from training.loop import Draws, local_batch

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "tests" / "toy_stage.py")


def start_two(*jobs: str) -> tuple[list[int], list[str]]:
    """The toy stage, job after job (OUT[,key=value,...]), in two processes as a launcher starts them, which ends the other when one has failed:
    -> their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, said = [], [tempfile.TemporaryFile("w+") for _ in range(2)]
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([sys.executable, TOY, *jobs], env=env, cwd=ROOT, stdout=said[rank], stderr=said[rank]))
    end = time.monotonic() + 300  # far more than it takes, where nobody waits for ever
    while any(p.poll() is None for p in started) and not any(p.poll() for p in started) and time.monotonic() < end:
        time.sleep(0.05)
    for process in started:  # where one has failed the other would wait for it for ever
        process.kill()
        process.wait()
    for file in said:
        file.seek(0)
    return [p.returncode for p in started], [file.read() for file in said]


def run_on_two(*jobs: str) -> None:
    codes, said = start_two(*jobs)
    assert codes == [0, 0], "\n".join(s[-3000:] for s in said)


def state(out: Path, step: int) -> dict:
    return torch.load(out / "toy" / "checkpoints" / f"step-{step:07d}.pt", weights_only=True)["parts"]


def assert_equal_states(a: dict, b: dict, tolerance: float) -> None:
    """Weights, averages, and the optimiser's running means of the gradients."""
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
    torch.testing.assert_close({k: a[k] for k in ("model", "ema")}, {k: b[k] for k in ("model", "ema")}, rtol=0, atol=tolerance)
    torch.testing.assert_close(a["opt"]["state"], b["opt"]["state"], rtol=0, atol=tolerance)


def without_the_last_step(source: Path, target: Path) -> Path:
    shutil.copytree(source / "toy", target / "toy")
    (target / "toy" / "checkpoints" / "step-0000003.pt").unlink()
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Three steps on one process, on two, on two with FSDP2; the same with CAME; the third step alone on two with FSDP2."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("one", "came", "poisoned", "two", "fsdp", "came_fsdp", "continued", "two_poisoned")}
    work(str(found["one"]), 3, "sana")
    work(f"{found['came']},optimizer=came", 3, "sana")
    work(f"{found['poisoned']},poisoned=1", 3, "sana")
    without_the_last_step(found["one"], found["continued"])
    run_on_two(str(found["two"]), f"{found['fsdp']},fsdp=true", f"{found['came_fsdp']},fsdp=true,optimizer=came", f"{found['continued']},fsdp=true",
               f"{found['two_poisoned']},poisoned=1")
    return found


@pytest.mark.parametrize("several", ["two", "fsdp"])
def test_gradients_and_weights_equal_those_of_one_process(runs, several):
    assert_equal_states(state(runs["one"], 3), state(runs[several], 3), 1e-9)
    assert not torch.equal(state(runs["one"], 2)["model"]["proj_out.weight"], state(runs["one"], 3)["model"]["proj_out.weight"])


def test_came_on_shards_equals_came(runs):
    """Where the true gradient is 0 (a key's bias) it divides noise by noise: not compared."""
    one, several = ({k: v for k, v in state(runs[name], 3)["model"].items() if not k.endswith("attn2.to_k.bias")} for name in ("came", "came_fsdp"))
    torch.testing.assert_close(several, one, rtol=0, atol=1e-7)


def test_a_bad_gradient_on_one_process_skips_the_step_on_all(runs):
    assert_equal_states(state(runs["poisoned"], 3), state(runs["two_poisoned"], 3), 1e-9)
    assert state(runs["two_poisoned"], 3)["tally"] == {"skipped": 1}


def test_a_sharded_model_is_saved_whole_and_loads_as_its_own_class(runs):
    model, same = SanaTransformer2DModel.from_pretrained(runs["one"] / "model"), SanaTransformer2DModel.from_pretrained(runs["fsdp"] / "model")
    assert '"SanaTransformer2DModel"' in (runs["fsdp"] / "model" / "config.json").read_text()
    torch.testing.assert_close(dict(same.state_dict()), dict(model.state_dict()), rtol=0, atol=1e-6)
    assert not list((runs["fsdp"] / "toy").rglob("*.tmp"))


def test_one_process_resumed_on_two_gives_the_same_numbers(runs):
    assert_equal_states(state(runs["one"], 3), state(runs["continued"], 3), 1e-9)


@pytest.mark.parametrize("first", ["two", "fsdp"])
def test_two_processes_resumed_on_one_give_the_same_numbers(runs, tmp_path, first):
    work(str(without_the_last_step(runs[first], tmp_path)), 3, "sana")
    assert_equal_states(state(runs["one"], 3), state(tmp_path, 3), 1e-9)


def test_the_processes_draw_one_batch_together():
    whole, parts = Draws(3, 7), [Draws(3, 7, rank, 4) for rank in range(4)]
    assert torch.equal(whole.normal(8, 2), torch.cat([d.normal(2, 2) for d in parts]))
    assert torch.equal(whole.uniform(8), torch.cat([d.uniform(2) for d in parts]))
    micro = [d for rank in range(2) for d in Draws(3, 7, rank, 2).parts(2)]
    assert torch.equal(Draws(3, 7).normal(8, 2), torch.cat([d.normal(2, 2) for d in micro]))


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 3)])
def test_micro_batches_share_one_draw_of_the_bits_that_each_drew_for_itself(monkeypatch, rank, world):
    """As each micro-batch did it: its own generator draws the numbers of the whole batch, of which it keeps its rows."""
    count, rows, drawn = 4, 3, []
    real = torch.randn
    parts = Draws(5, 9, rank, world).parts(count)
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: (drawn.append(shape), real(*shape, **how))[1])
    found = [(part.normal(rows, 2, 5), part.uniform(rows), part.normal(rows)) for part in parts]
    assert drawn == [(rows * count * world, 2, 5), (rows * count * world,)]
    for i, (a, b, c) in enumerate(found):
        alone = Draws(5, 9, rank * count + i, world * count)
        assert torch.equal(a, alone.normal(rows, 2, 5)) and torch.equal(b, alone.uniform(rows)) and torch.equal(c, alone.normal(rows))
        assert a.untyped_storage().nbytes() == a.nbytes  # no view that would keep the whole
    assert not parts[0].shared.waiting


def test_micro_batches_that_do_not_draw_alike_are_noticed():
    first, second = Draws(0, 0).parts(2)
    first.normal(2, 3)
    with pytest.raises(AssertionError, match="draw alike"):
        second.normal(2, 4)


@pytest.mark.parametrize("sets", ["", ",fsdp=true"])
def test_out_of_memory_on_one_process_is_said_and_stops_both(tmp_path, sets):
    """The trial that counts activations would have to be run by both: the other one is in the step itself."""
    codes, said = start_two(f"{tmp_path / 'out'}{sets},hungry=1")
    assert codes[1] not in (0, None) and codes[0] != 0
    assert "out of memory at step 1" in said[1] and "activations unknown: not tried with several processes" in said[1], said[1][-3000:]
    helps = said[1].split("What would help (--set):\n")[1].splitlines()[:3]
    assert [h.removeprefix("[rank1]:").split("=")[0].strip() for h in helps] == ["micro_batches", "optimizer", "precision" if sets else "fsdp"]
    assert [p.name for p in (tmp_path / "out" / "toy" / "checkpoints").glob("*.pt")] == ["step-0000001.pt"]  # the other has not made the step


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="cannot be shared evenly by 1 processes with micro_batches=3"):
        local_batch(8, Config(micro_batches=3))


def test_the_students_stage_refuses_fsdp_and_says_what_works(tmp_path):
    from training.student import train_student
    with pytest.raises(ValueError, match="JVP.*Data parallel works"):
        train_student(Config(fsdp=True), tmp_path)
    refuse_fsdp(Config(), "")


def test_the_student_on_two_processes_has_the_gradients_of_one(tmp_path):
    """The real stage from torchrun's command line, one step of the student and one of its discriminator."""
    from test_dry_run import SIZES, start_folder
    from training.student import train_student
    start_folder(tmp_path / "one")
    sets = [*SIZES, "student_batch=8", "student_steps=2", "tracker=none"]
    train_student(load_config("tiny-cpu", sets), tmp_path / "one")
    arguments = ["-m", "training", "student", "--recipe", "tiny-cpu", *(f"--set={s}" for s in sets)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("student"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([sys.executable, *launch, *arguments, "--out", str(tmp_path / "two")], cwd=ROOT, env=environment, check=True)
    one, two = (torch.load(tmp_path / n / "student" / "checkpoints" / "step-0000002.pt", weights_only=True)["parts"] for n in ("one", "two"))
    for opt in ("opt", "disc_opt"):
        a, b = (torch.cat([s["exp_avg"].flatten() for s in parts[opt]["state"].values()]) for parts in (one, two))
        assert 0 < a.norm() and (a - b).norm() < 1e-5 * a.norm()
