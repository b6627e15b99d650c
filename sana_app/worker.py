"""One thread owns the model. Every tab has one waiting place, and the newest frame takes it.

    tab A:  frame 7 (being rendered)   frame 9 (waiting; frame 8 was answered "superseded")
    tab B:                             frame 3 (waiting)          -> next in turn after A's running frame

The waiting places form a ring: a tab that has just been served goes to the end, so that a fast pen cannot starve a
slow one. The ring is bounded; past the bound a frame is refused at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future


class Superseded(Exception):
    """A newer frame of the same tab came before this one was begun."""


class Busy(Exception):
    """Too many tabs are waiting; try again after `retry_s` seconds."""

    def __init__(self, waiting: int, retry_s: int = 1):
        super().__init__(f"{waiting} drawings are waiting already; try again in {retry_s} s")
        self.retry_s = retry_s


class RenderWorker:
    """`render(request) -> result` is only ever called from the worker's own thread, one call at a time."""

    def __init__(self, render: Callable, max_tabs: int = 64):
        self.render = render
        self.max_tabs = max_tabs
        self.waiting: OrderedDict[str, tuple[object, Future]] = OrderedDict()  # tab -> (request, future), in turn order
        self.change = threading.Condition()
        self.thread: threading.Thread | None = None
        self.stopping = False

    def submit(self, tab: str, request) -> Future:
        """Queue the newest frame of `tab`. The future gives the result, or Superseded, or render's own exception."""
        future: Future = Future()
        with self.change:
            older = self.waiting.get(tab)
            if older is None and len(self.waiting) >= self.max_tabs:
                raise Busy(len(self.waiting))
            self.waiting[tab] = (request, future)  # an existing key keeps its place in the turn
            self._start()
            self.change.notify()
        if older is not None and older[1].set_running_or_notify_cancel():
            older[1].set_exception(Superseded())
        return future

    def withdraw(self, tab: str, future: Future) -> None:
        """The client has gone: free its waiting place (a frame already begun is finished and thrown away)."""
        with self.change:
            held = self.waiting.get(tab)
            if held is not None and held[1] is future:
                del self.waiting[tab]
        future.cancel()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish the running frame, cancel the waiting ones."""
        with self.change:
            self.stopping = True
            left, thread = list(self.waiting.values()), self.thread
            self.waiting.clear()
            self.change.notify()
        for _, future in left:
            future.cancel()
        if thread is not None:
            thread.join(timeout_s)

    def _start(self) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.stopping = False
            self.thread = threading.Thread(target=self._run, name="sana-render", daemon=True)
            self.thread.start()

    def _run(self) -> None:
        while True:
            with self.change:
                self.change.wait_for(lambda: self.waiting or self.stopping)
                if self.stopping:
                    return
                _, (request, future) = self.waiting.popitem(last=False)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self.render(request)
            except Exception as error:  # one bad frame must not end the thread that serves everybody
                future.set_exception(error)
            else:
                future.set_result(result)
