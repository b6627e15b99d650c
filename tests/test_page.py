"""Drawing in a real browser, with an engine that answers at once: what a person with a pen must be able to rely on."""

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
from browser import LINE, LOW_LINE, Pad, chromium, pad, served, slowdown, tab, url  # noqa: F401
from echo_engine import EchoEngine
from layouts import build_small_folder
from PIL import Image

from sana_app.engine import Engine
from sana_app.presets import EMOJI_STYLES, Preset
from sana_app.request import RenderRequest

pytestmark = pytest.mark.browser


def test_the_page_opens_with_a_drawing_and_its_picture(chromium, url):
    context = chromium.new_context()
    context.route("**/live/frame", lambda route: route.abort())  # no answer at all: the first picture came with the page
    pad = Pad(context.new_page(), url, ready=False)
    pad.page.wait_for_function("document.querySelector('.sp-picture').width >= 512")
    assert pad.canvas("ink").max() == 255 and pad.canvas("picture").min() < 60
    assert pad.page.input_value("#prompt textarea") == "a red apple"
    context.close()


def test_the_first_stroke_gives_its_picture(pad):
    pad.blank()
    assert pad.canvas("ink").max() == 0 and pad.canvas("picture").min() > 200
    pad.stroke(*LINE)
    pad.settle()
    assert pad.ink_at(160, 108) > 200 and pad.shows_its_ink()
    assert re.match(r"model \d+ ms · total \d+ ms", pad.page.inner_text(".sp-times"))


def test_pictures_arrive_while_the_pen_is_down(pad):
    pad.blank()
    pad.move(LINE[0])
    pad.page.mouse.down()
    for point in LINE[1:]:
        seq = pad.seq
        pad.move(point)
        pad.after(seq)  # the pen is still down
    assert pad.canvas("picture")[50:56, 40:200].min() < 60
    pad.page.mouse.up()


def test_with_live_off_pictures_come_when_the_pen_is_lifted(pad):
    pad.blank()
    pad.page.uncheck("#live input")
    pad.settle()
    sent = len(pad.sent)
    pad.move(LINE[0])
    pad.page.mouse.down()
    pad.move(*LINE[1:])
    assert len(pad.sent) == sent
    pad.page.mouse.up()
    pad.settle()
    assert len(pad.sent) == sent + 1 and pad.shows_its_ink()


BURST = """(points) => {
    const canvas = document.querySelector('.sp-ink'), box = canvas.getBoundingClientRect();
    canvas.setPointerCapture = () => {};  // a made-up pointer cannot be captured
    points.forEach(([x, y], i) => canvas.dispatchEvent(new PointerEvent(
        i === 0 ? 'pointerdown' : i === points.length - 1 ? 'pointerup' : 'pointermove',
        {pointerId: 7, isPrimary: true, button: 0, bubbles: true, clientX: box.left + x * box.width / 512, clientY: box.top + y * box.height / 512})));
}"""


def test_a_burst_of_points_makes_a_bounded_number_of_requests(pad):
    pad.blank()
    sent = len(pad.sent)
    angle = np.linspace(0, 6 * np.pi, 300)
    pad.page.evaluate(BURST, np.stack([256 + angle * 10 * np.cos(angle), 256 + angle * 10 * np.sin(angle)], 1).tolist())
    pad.settle()
    assert len(pad.sent) - sent <= 3, "a burst within one moment is one or two pictures"
    assert pad.shows_its_ink() and pad.canvas("ink").astype(bool).sum() > 3000
    sent, start = len(pad.sent), time.perf_counter()
    pad.stroke(*((60 + 4 * i, 60) for i in range(100)))
    pad.settle()
    assert len(pad.sent) - sent <= 34 * (time.perf_counter() - start) + 2, "and a long stroke at most one every 30 ms"


def test_the_last_stroke_always_wins(pad):
    pad.blank()
    for i in range(12):
        pad.stroke((40 + 36 * i, 60), (40 + 36 * i, 440))
    pad.settle()
    assert pad.shows_its_ink()
    assert np.abs(pad.sent[-1]["ink"] - pad.canvas("ink")).mean() < 3, "the last request carries the last drawing"


def test_two_tabs_never_see_each_others_picture(tab):
    left, right = tab(), tab()
    for pad in (left, right):
        pad.click("clear")
    for i in range(4):
        left.stroke((60, 60 + 30 * i), (220, 60 + 30 * i))
        right.stroke((300, 300 + 30 * i), (450, 300 + 30 * i))
    for pad in (left, right):
        pad.settle()
        assert pad.shows_its_ink()
    assert left.canvas("picture")[140:].min() > 200 and right.canvas("picture")[:140].min() > 200


def test_undo_redo_and_clear_restore_every_pixel(pad):
    states = [pad.canvas("ink")]
    for act in (lambda: pad.click("clear"), lambda: pad.stroke(*LINE), lambda: pad.stroke(*LOW_LINE), lambda: pad.click("clear")):
        act()
        states.append(pad.canvas("ink"))
    assert len({s.tobytes() for s in states}) == 4  # the two cleared pages are the same
    for state in states[-2::-1]:
        pad.click("undo")
        assert np.array_equal(pad.canvas("ink"), state)
    for state in states[1:]:
        pad.click("redo")
        assert np.array_equal(pad.canvas("ink"), state)
    pad.page.keyboard.press("Control+z")
    assert np.array_equal(pad.canvas("ink"), states[-2])
    pad.page.keyboard.press("Control+Shift+z")
    pad.settle()
    assert np.array_equal(pad.canvas("ink"), states[-1]) and pad.shows_its_ink()


def test_eraser_mirror_and_straight_line(pad):
    pad.blank()
    pad.stroke(*LINE)
    pad.page.keyboard.press("e")
    pad.stroke((260, 60), (260, 150))
    assert pad.ink_at(260, 100) == 0 and pad.ink_at(160, 108) > 200
    pad.page.keyboard.press("b")
    pad.page.keyboard.press("x")
    pad.stroke((80, 300), (80, 400))
    assert pad.ink_at(80, 350) > 200 and pad.ink_at(512 - 80, 350) > 200
    pad.page.keyboard.press("x")
    pad.page.keyboard.down("Shift")
    pad.stroke((100, 460), (200, 420), (300, 500), (400, 460))
    pad.page.keyboard.up("Shift")
    assert pad.ink_at(250, 460) > 200 and pad.ink_at(200, 424) == 0
    pad.settle()
    assert pad.shows_its_ink()


def test_a_tap_is_a_dot_and_the_pen_has_a_size(pad):
    pad.blank()
    pad.stroke((100, 100))
    for _ in range(10):
        pad.page.keyboard.press("]")
    pad.stroke((300, 100))
    small, large = pad.canvas("ink", 512)[:, :200], pad.canvas("ink", 512)[:, 200:]
    assert 15 < (small > 128).sum() < 60 and 120 < (large > 128).sum() < 320


def test_a_pressed_pen_draws_a_wider_line(pad):
    pad.blank()
    cdp = pad.page.context.new_cdp_session(pad.page)

    def pen(kind, x, y, force):
        x, y = pad.at(x, y)
        cdp.send("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1,
                                              "pointerType": "pen", "force": force, "clickCount": 1})

    for y, force in ((100, 0.1), (300, 0.9)):
        pen("mousePressed", 60, y, force)
        for x in range(80, 440, 40):
            pen("mouseMoved", x, y, force)
        pen("mouseReleased", 440, y, force)
    ink = pad.canvas("ink", 512) > 128
    assert ink[260:340, 250].sum() > 1.8 * ink[60:140, 250].sum() > 0


def test_a_finger_draws_on_a_phone_in_one_column(tab):
    pad = tab(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2)
    pad.blank()
    cdp = pad.page.context.new_cdp_session(pad.page)
    paper = pad.page.locator(".sp-ink")
    paper.scroll_into_view_if_needed()
    for kind, *points in (("touchStart", (100, 200)), ("touchMove", (200, 210)), ("touchMove", (400, 200)), ("touchEnd",)):
        places = [dict(zip("xy", pad.at(*point))) for point in points]
        cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
    pad.settle()
    assert pad.ink_at(200, 207) > 128 and pad.shows_its_ink()
    paper, picture = paper.bounding_box(), pad.page.locator(".sp-picture").bounding_box()
    assert picture["y"] > paper["y"] + paper["height"] and abs(picture["x"] - paper["x"]) < 1
    assert pad.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_slow_model_is_asked_when_the_pen_is_lifted(tab):
    with served(EchoEngine(delay_s=0.5), slow_ms=400) as (_, url):
        pad = tab(url)
        for _ in range(2):
            pad.stroke(*LOW_LINE)
            pad.settle()
        sent = len(pad.sent)
        pad.move(LINE[0])
        pad.page.mouse.down()
        pad.move(*LINE[1:])
        assert len(pad.sent) == sent
        pad.page.mouse.up()
        pad.settle()
        assert pad.shows_its_ink() and "pen is lifted" in pad.page.inner_text(".sp-status")


def downloaded(pad):
    with pad.page.expect_download() as download:
        pad.click("save")
    assert download.value.suggested_filename == f"sana-sketch-{pad.sent[-1]['seed']}.png"
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def test_the_picture_can_be_downloaded(pad):
    image = downloaded(pad)
    assert image.format == "PNG" and image.size == (256, 256)


def test_the_overhead_of_the_page_is_small(pad):
    """Pen to picture with a model of 0 ms takes less than 250 ms, half of the time, in the best of three batches."""
    medians, limit_ms = [], 250 * slowdown()
    for _ in range(3):
        pad.blank()
        totals = []
        for i in range(15):
            seq = pad.seq
            pad.stroke((60 + 25 * i, 80), (60 + 25 * i, 420))
            pad.after(seq)
            pad.settle()
            totals.append(int(re.search(r"total (\d+) ms", pad.page.inner_text(".sp-times")).group(1)))
        medians.append(np.median(totals))
        print(f"overhead p50 {np.median(totals):.0f} ms, p95 {np.percentile(totals, 95):.0f} ms")
        if medians[-1] < limit_ms:
            return
    assert min(medians) < limit_ms


def test_the_picture_on_the_page_is_the_models_own(tab, tmp_path):
    """The real pipeline behind the page: what is shown is what the engine renders for the frame that was sent."""
    engine = Engine.load(Preset("small", str(build_small_folder(tmp_path / "small")), EMOJI_STYLES))
    with served(engine) as (_, url):
        pad = tab(url)
        pad.stroke(*LOW_LINE)
        pad.settle()
        sent = {name: pad.sent[-1][name] for name in ("ink", "prompt", "style", "strength", "steps", "seed", "guidance")}
        wanted = np.asarray(Image.open(io.BytesIO(engine.render(RenderRequest(**sent)).jpeg)))
        shown = np.asarray(downloaded(pad).convert("RGB"))
        assert np.abs(shown.astype(int) - wanted).max() <= 3  # two JPEG decoders round alike, to a few levels
        other = engine.render(RenderRequest(**sent | {"seed": sent["seed"] + 1})).pixels
        assert np.abs(shown.astype(int) - other).mean() > 12
