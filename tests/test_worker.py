"""The server's scheduler: newest frame wins, tabs take turns, the queue is bounded, one bad frame ends nothing."""

import threading
from concurrent.futures import CancelledError

import pytest

from sana_app.worker import Busy, RenderWorker, Superseded

WAIT_S = 10


class Gate:
    """A render function that holds its first call until `open()`, and writes down what it rendered, in order."""

    def __init__(self):
        self.begun, self.opened, self.order = threading.Event(), threading.Event(), []

    def __call__(self, request):
        self.begun.set()
        assert self.opened.wait(WAIT_S)
        self.order.append(request)
        if request == "bad":
            raise RuntimeError("no picture of this")
        return f"picture of {request}"


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def worker(gate):
    worker = RenderWorker(gate, max_tabs=3)
    yield worker
    gate.opened.set()
    worker.stop()


def begin(worker, gate):
    """Occupy the worker, so that everything submitted next has to wait."""
    first = worker.submit("first", "first")
    assert gate.begun.wait(WAIT_S)
    return first


def test_the_newest_frame_of_a_tab_replaces_the_one_not_begun(worker, gate):
    first = begin(worker, gate)
    older = [worker.submit("a", f"frame {i}") for i in range(20)]
    newest = worker.submit("a", "frame 20")
    gate.opened.set()
    assert newest.result(WAIT_S) == "picture of frame 20"
    assert first.result(WAIT_S) == "picture of first"
    for future in older:
        with pytest.raises(Superseded):
            future.result(WAIT_S)
    assert gate.order == ["first", "frame 20"]


def test_a_fast_tab_does_not_starve_a_slow_one(worker, gate):
    begin(worker, gate)
    worker.submit("fast", "fast 1")
    slow = worker.submit("slow", "slow 1")
    fast = worker.submit("fast", "fast 2")
    gate.opened.set()
    fast.result(WAIT_S), slow.result(WAIT_S)
    assert gate.order == ["first", "fast 2", "slow 1"]


def test_past_the_bound_a_new_tab_is_refused_and_a_waiting_one_may_still_update(worker, gate):
    begin(worker, gate)
    for tab in "abc":
        worker.submit(tab, tab)
    with pytest.raises(Busy) as refused:
        worker.submit("d", "d")
    assert refused.value.retry_s >= 1
    newest = worker.submit("a", "a again")
    gate.opened.set()
    assert newest.result(WAIT_S) == "picture of a again"
    assert worker.submit("d", "d").result(WAIT_S) == "picture of d"


def test_a_frame_that_fails_is_reported_and_the_next_one_is_rendered(worker, gate):
    gate.opened.set()
    with pytest.raises(RuntimeError, match="no picture of this"):
        worker.submit("a", "bad").result(WAIT_S)
    assert worker.submit("a", "good").result(WAIT_S) == "picture of good"


def test_a_client_that_leaves_frees_its_waiting_place(worker, gate):
    begin(worker, gate)
    left = worker.submit("a", "left")
    worker.withdraw("a", left)
    stays = worker.submit("b", "stays")
    gate.opened.set()
    stays.result(WAIT_S)
    assert left.cancelled() and gate.order == ["first", "stays"]


def test_withdrawing_an_older_frame_keeps_the_newer_one(worker, gate):
    begin(worker, gate)
    older, newer = worker.submit("a", "older"), worker.submit("a", "newer")
    worker.withdraw("a", older)
    gate.opened.set()
    assert newer.result(WAIT_S) == "picture of newer"


def test_stopping_cancels_what_waits_and_a_later_frame_starts_again(worker, gate):
    running = begin(worker, gate)
    waiting = worker.submit("a", "waiting")
    threading.Timer(0.05, gate.opened.set).start()
    worker.stop()
    assert running.result(WAIT_S) == "picture of first"
    with pytest.raises(CancelledError):
        waiting.result(WAIT_S)
    assert worker.submit("a", "later").result(WAIT_S) == "picture of later"
