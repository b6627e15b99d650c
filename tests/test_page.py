"""The page in a real browser, with an engine that answers at once: what a person with a pen must be able to rely on."""

import io
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, FLAGS, WAIT_MS, Pad, served
from echo_engine import EchoEngine
from gradio.context import Context
from layouts import build_small_folder
from PIL import Image
from playwright.sync_api import sync_playwright

from sana_app.engine import Engine
from sana_app.presets import EMOJI_STYLES, Preset
from sana_app.request import RenderRequest

pytestmark = pytest.mark.browser


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


LINE = [(60, 100), (160, 110), (260, 100), (360, 110), (450, 100)]
LOW_LINE = [(60, 400), (260, 410), (450, 400)]


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


def test_an_example_fills_pad_and_controls_and_can_be_undone(pad):
    before = pad.canvas("ink")
    examples = pad.page.locator(".sp-example")
    assert examples.count() == 6
    examples.nth(1).click()
    pad.settle()
    assert pad.page.input_value("#prompt textarea") == "a cat face" == pad.sent[-1]["prompt"]
    assert pad.page.input_value("#seed input") == str(pad.sent[-1]["seed"])
    assert not np.array_equal(pad.canvas("ink"), before) and pad.shows_its_ink()
    pad.click("undo")
    assert np.array_equal(pad.canvas("ink"), before)


def test_every_control_reaches_the_frame(pad):
    pad.page.fill("#prompt textarea", "a blue cat, très petit 🐈")
    pad.page.click("#style input")
    pad.page.get_by_role("option", name="twemoji").click()
    pad.page.get_by_label("4", exact=True).check()
    pad.page.fill("#seed input", "1234")
    pad.page.fill("#strength input[type=number]", "0.5")
    pad.page.fill("#guidance input[type=number]", "6")
    pad.page.keyboard.press("Tab")
    pad.page.wait_for_function("window.sanaSketch.settings.guidance === 6")
    pad.settle()
    wanted = {"prompt": "a blue cat, très petit 🐈", "style": "twemoji", "steps": 4, "seed": 1234, "strength": 0.5, "guidance": 6}
    assert {name: pad.sent[-1][name] for name in wanted} == wanted
    pad.page.keyboard.press("Space") if pad.page.evaluate("document.activeElement.blur()") else pad.click("ink")
    pad.page.keyboard.press("Space")  # the dice
    pad.page.wait_for_function("window.sanaSketch.settings.seed !== 1234")
    pad.settle()
    assert pad.sent[-1]["seed"] != 1234


def test_an_unlocked_seed_changes_with_every_stroke(pad):
    locked = {frame["seed"] for frame in pad.sent}
    pad.stroke(*LINE)
    pad.settle()
    assert {frame["seed"] for frame in pad.sent} == locked and len(locked) == 1
    pad.page.uncheck("#lock input")
    pad.stroke(*LINE)
    pad.settle()
    assert pad.sent[-1]["seed"] not in locked
    assert pad.page.input_value("#seed input") == str(pad.sent[-1]["seed"])


INJECTIONS = ["${window.hacked = 1}", "{{constructor.constructor('window.hacked=1')()}}", "<img src=x onerror='window.hacked=1'>",
              "`;window.hacked=1;`", "</script><script>window.hacked=1</script>", "'; DROP TABLE x; --\\"]


def test_injection_strings_do_nothing_and_arrive_as_they_are(pad):
    for text in INJECTIONS:
        pad.page.fill("#prompt textarea", text)
        pad.page.wait_for_function("text => window.sanaSketch.settings.prompt === text", arg=text)
        pad.settle()
        assert pad.sent[-1]["prompt"] == text
    pad.page.fill("#prompt textarea", INJECTIONS[2])
    pad.page.reload()  # the prompt comes back from the tab's own store
    pad.page.wait_for_function("window.sanaSketch && document.querySelector('.sp[data-state=idle]')")
    assert pad.page.evaluate("window.hacked === undefined") and pad.page.locator("img[src=x]").count() == 0


def test_a_hostile_message_from_the_server_is_shown_as_text(tab):
    pad = tab()
    pad.page.route("**/live/frame", lambda route: route.fulfill(
        status=400, content_type="application/json", body='{"error": "<img src=x onerror=window.hacked=1>${window.hacked=1}"}'))
    pad.stroke(*LINE)
    pad.page.wait_for_selector('.sp[data-state="error"]')
    assert "<img" in pad.page.inner_text(".sp-status") and pad.page.evaluate("window.hacked === undefined")


def test_keys_are_ignored_while_typing(pad):
    pad.page.click("#prompt textarea")
    pad.page.keyboard.type("bex ? [a]")
    assert pad.page.get_attribute(".sp-eraser", "aria-pressed") == "false"
    assert pad.page.get_attribute(".sp-mirror", "aria-pressed") == "false"
    assert not pad.page.is_visible(".sp-keys")
    pad.click("help")
    assert pad.page.is_visible(".sp-keys")


def test_holding_compare_shows_the_drawing_over_the_picture(pad):
    pad.page.locator(".sp-ink").focus()
    pad.page.keyboard.down("a")
    pad.page.wait_for_function("Number(getComputedStyle(document.querySelector('.sp-over')).opacity) === 1")
    assert np.array_equal(pad.canvas("over"), pad.canvas("ink"))
    pad.page.keyboard.up("a")
    pad.page.wait_for_function("Number(getComputedStyle(document.querySelector('.sp-over')).opacity) === 0")


def downloaded(pad):
    with pad.page.expect_download() as download:
        pad.click("save")
    assert download.value.suggested_filename == "sana-sketch-7.png"
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def test_the_picture_can_be_downloaded(pad):
    image = downloaded(pad)
    assert image.format == "PNG" and image.size == (256, 256)


def test_a_refused_route_falls_back_to_server_functions(chromium, url):
    context = chromium.new_context()
    context.route("**/live/frame", lambda route: route.fulfill(status=404, body="no such route"))
    pad = Pad(context.new_page(), url)
    pad.blank()
    pad.stroke(*LINE)
    pad.settle()
    assert pad.shows_its_ink() and len(pad.sent) == 1, "refused once, not asked again"
    context.close()


@pytest.mark.parametrize("same_page", [True, False], ids=["same page", "another page"])
def test_a_restart_of_the_server_while_drawing_loses_no_stroke(tab, same_page):
    """The same program started again numbers its components as before; another version does not."""
    first_id = Context.id
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with served(server_port=port) as (_, url):
        pad = tab(url)
        pad.blank()
        pad.stroke(*LINE)
        pad.settle()
        pad.move((60, 300))
        pad.page.mouse.down()
        pad.move((200, 300))
    pad.move((300, 300), (450, 300))  # the server has gone while the pen is down
    pad.page.wait_for_selector('.sp[data-state="offline"]')
    assert "kept" in pad.page.inner_text(".sp-status")
    pad.page.mouse.up()
    pad.stroke(*LOW_LINE)
    drawn = pad.canvas("ink")
    Context.id = first_id if same_page else Context.id
    with served(server_port=port):
        pad.page.wait_for_selector('.sp[data-state="idle"]', timeout=2 * WAIT_MS)
        assert np.array_equal(pad.canvas("ink"), drawn) and pad.shows_its_ink()
        assert pad.ink_at(160, 108) > 200 and pad.ink_at(380, 300) > 200 and pad.ink_at(260, 407) > 200


def test_a_reload_keeps_the_drawing_and_the_words(pad):
    pad.blank()
    pad.stroke(*LINE)
    pad.page.fill("#prompt textarea", "a green snake")
    pad.page.wait_for_function("window.sanaSketch.settings.prompt === 'a green snake'")
    pad.settle()
    drawn = pad.canvas("ink")
    pad.page.reload()
    pad.page.wait_for_function("window.sanaSketch && window.sanaSketch.settings.prompt === 'a green snake'")
    pad.settle()
    assert np.array_equal(pad.canvas("ink"), drawn) and pad.page.input_value("#prompt textarea") == "a green snake"
    assert pad.sent[-1]["prompt"] == "a green snake"


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


def test_every_control_has_a_name_and_the_order_is_words_then_page_then_tools(pad):
    unnamed = pad.page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, canvas[tabindex]')]
        .filter((e) => e.offsetParent && !(e.innerText || e.getAttribute('aria-label') || e.title || (e.labels && e.labels.length)))
        .map((e) => e.outerHTML.slice(0, 120))""")
    assert unnamed == []
    pad.page.locator("#prompt textarea").focus()
    order = []
    for _ in range(4):
        pad.page.keyboard.press("Tab")
        order.append(pad.page.evaluate("document.activeElement.className + ' ' + document.activeElement.closest('[id]').id"))
    assert "style" in order[0] and "sp-ink" in order[1] and "sp-pen" in order[2] and "sp-eraser" in order[3]
    assert pad.page.get_attribute(".sp-status", "aria-live") == "polite"


def test_the_overhead_of_the_page_is_small(pad):
    """Pen to picture with a model of 0 ms: half of the time under 250 ms, in the best of three batches on a busy machine."""
    medians = []
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
        if medians[-1] < 250:
            return
    assert min(medians) < 250


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
