"""A real Chromium on a real server: what the page tests share. Nothing here sleeps; it waits on the pad's attributes."""

import json
import re
import struct
import time
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from echo_engine import EchoEngine
from playwright.sync_api import sync_playwright

from sana_app.ui import build_page

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
WAIT_MS = 60_000
LINE = [(60, 100), (160, 110), (260, 100), (360, 110), (450, 100)]
LOW_LINE = [(60, 400), (260, 410), (450, 400)]  # two strokes in page units
STARVED_MS = 20_000  # a busy test machine is not a slow model: live pictures go on up to this round trip


@contextmanager
def served(engine=None, slow_ms=STARVED_MS, **launch):
    """The page for `engine` on a free loopback port (or the one given); yields (blocks, url)."""
    page = build_page(engine or EchoEngine(), slow_ms=slow_ms)
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch)
        yield page, url
    finally:
        page.close(verbose=False)


class Pad:
    """A tab with the page open, drawn on in page units (512 x 512)."""

    def __init__(self, page, url, ready=True):
        self.page, self.sent, self.urls, self.troubles = page, [], [], []
        page.set_default_timeout(WAIT_MS)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("dialog", lambda dialog: (self.troubles.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        page.wait_for_selector(".sp")
        if ready:
            self.settle()

    def _note(self, request):
        self.urls.append(request.url)
        if request.url.endswith("/live/frame"):
            self.sent.append(unpack(request.post_data_buffer or b""))

    def data(self, name):
        return self.page.get_attribute(".sp", f"data-{name}")

    def settle(self):
        """Until every change has been answered."""
        self.page.wait_for_selector('.sp[data-state="idle"]')

    def after(self, seq):
        """Until a picture later than `seq` is shown."""
        self.page.wait_for_function("seq => Number(document.querySelector('.sp').dataset.seq) > seq", arg=seq)

    @property
    def seq(self):
        return int(self.data("seq"))

    def at(self, x, y):
        box = self.page.locator(".sp-ink").bounding_box()
        return box["x"] + x * box["width"] / 512, box["y"] + y * box["height"] / 512

    def move(self, *points):
        for point in points:
            self.page.mouse.move(*self.at(*point))

    def stroke(self, *points):
        self.move(points[0])
        self.page.mouse.down()
        self.move(*points[1:])
        self.page.mouse.up()

    def click(self, name):
        self.page.click(f".sp-{name}")

    def blank(self):
        self.click("clear")
        self.settle()

    def canvas(self, name, side=256):
        """A canvas of the pad as [side, side]: ink as alpha 0..255, a picture as grey 0..255."""
        values = self.page.evaluate("""([name, side]) => {
            const from = document.querySelector('.sp-' + name), to = document.createElement('canvas');
            to.width = to.height = side;
            const ctx = to.getContext('2d');
            ctx.drawImage(from, 0, 0, side, side);
            const rgba = ctx.getImageData(0, 0, side, side).data;
            return Array.from({length: side * side}, (_, i) => name === 'picture' ? rgba[4 * i] : rgba[4 * i + 3]);
        }""", [name, side])
        return np.array(values).reshape(side, side)

    def ink_at(self, x, y):
        return self.canvas("ink", 512)[y, x]

    def shows_its_ink(self):
        """Whether the echoed picture is that of the ink on the page (both smoothed by scaling)."""
        return np.abs(255 - self.canvas("ink") - self.canvas("picture")).mean() < 4


def unpack(body: bytes) -> dict:
    """The header of a live frame, with its ink under "ink"."""
    (length,) = struct.unpack(">I", body[:4])
    header = json.loads(body[4:4 + length])
    ink = np.frombuffer(zlib.decompress(body[4 + length:]), np.uint8)
    return header | {"ink": ink.reshape(header["height"], header["width"])}


def slowdown() -> float:
    """How many seconds this machine takes for one of ours: 1 when it is free, 10 beside a neighbour with priority."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.2:
        pass
    return (time.perf_counter() - wall) / 0.2


# ---- fixtures: import them into a test module, which then has one browser and one page server ---------------------------

@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url():
    with served() as (_, url):
        yield url


@pytest.fixture
def tab(chromium, url):
    """Open a tab with its own profile; every tab must end without a script error or an outside request."""
    contexts, pads = [], []

    def open_tab(to=url, ready=True, **options):
        contexts.append(chromium.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 900}), **options))
        pads.append(Pad(contexts[-1].new_page(), to, ready))
        return pads[-1]

    yield open_tab
    for context in contexts:
        context.close()
    for pad in pads:
        assert not pad.troubles
        assert [u for u in pad.urls if not re.match(r"(http://127\.0\.0\.1[:/]|data:|blob:)", u)] == []


@pytest.fixture
def pad(tab):
    return tab()
