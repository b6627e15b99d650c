"""The controls around the pad, the readout, the keys, hostile text, and a server that goes away: in a real browser."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import LINE, LOW_LINE, WAIT_MS, Pad, chromium, pad, served, tab, url  # noqa: F401
from echo_engine import EchoEngine
from gradio.context import Context

from sana_app import pad as pad_module
from sana_app.engine import STAGES
from sana_app.pad import read_examples
from sana_app.request import PROMPT_CHARS

pytestmark = pytest.mark.browser


def test_every_example_fills_pad_and_controls_and_can_be_undone(pad):
    examples, buttons = read_examples(), pad.page.locator(".sp-example")
    assert buttons.all_inner_texts() == [example["title"] for example in examples] and len(examples) == 6
    pad.blank()
    for button, example in zip(buttons.all(), examples):
        wanted = {name: example[name] for name in ("prompt", "style", "seed")}
        button.click()
        pad.page.wait_for_function("""wanted => Object.entries(wanted).every(([name, value]) => window.sanaSketch.settings[name] === value)
            && document.querySelector('#prompt textarea').value === wanted.prompt
            && document.querySelector('#style input').value === wanted.style
            && document.querySelector('#seed input').value === String(wanted.seed)""", arg=wanted)
        pad.settle()
        assert {name: pad.sent[-1][name] for name in wanted} == wanted
        x, y = example["strokes"][0]["points"][len(example["strokes"][0]["points"]) // 2]
        assert pad.data("strokes") == str(len(example["strokes"])) and pad.ink_at(x, y) > 128 and pad.shows_its_ink()
        pad.click("undo")
        pad.settle()
        assert pad.canvas("ink").max() == 0 and pad.shows_its_ink()


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


def test_what_the_server_says_of_a_frame_it_could_not_serve_is_shown(pad):
    pad.blank()
    said = {500: "the model could not make this picture", 503: "64 drawings are waiting already", 504: "no picture came within 30 s"}
    for status, text in said.items():
        pad.page.route("**/live/frame", lambda route: route.fulfill(
            status=status, content_type="application/json", body=json.dumps({"error": text})))  # noqa: B023 (unrouted below)
        pad.stroke(*LINE)
        pad.page.wait_for_function("text => document.querySelector('.sp-status').textContent.includes(text)", arg=text[1:])
        assert "drawing is kept" in pad.page.inner_text(".sp-status") and pad.data("state") == "offline"
        pad.page.unroute("**/live/frame")
        pad.settle()
        assert pad.page.inner_text(".sp-status") == "" and pad.shows_its_ink()
    pad.page.route("**/live/frame", lambda route: route.fulfill(status=502, body="<html>bad gateway</html>"))  # not ours: a proxy
    pad.stroke(*LINE)
    pad.page.wait_for_function("document.querySelector('.sp-status').textContent.includes('No answer from the server')")
    assert "html" not in pad.page.inner_text(".sp-status")


def test_of_a_pasted_prompt_that_is_too_long_the_page_says_what_is_read(pad):
    pad.page.locator("#prompt textarea").focus()
    pad.page.keyboard.press("Control+a")
    pad.page.keyboard.insert_text("🐈" * (PROMPT_CHARS + 100))
    said = "document.querySelector('.sp-status').textContent.includes('first 500 of the prompt\\'s 600 characters')"
    pad.page.wait_for_function(said)
    pad.settle()
    assert pad.page.evaluate(said) and pad.sent[-1]["prompt"] == "🐈" * PROMPT_CHARS
    assert pad.page.input_value("#prompt textarea") == "🐈" * (PROMPT_CHARS + 100), "what is too much is left to be shortened by hand"
    pad.page.fill("#prompt textarea", "é" * PROMPT_CHARS)
    pad.page.wait_for_function("window.sanaSketch.settings.prompt[0] === 'é'")
    pad.settle()
    assert pad.page.inner_text(".sp-status") == "" and pad.sent[-1]["prompt"] == "é" * PROMPT_CHARS


class RememberingEngine(EchoEngine):
    """Says that a picture took it 1234 ms, and nothing where it is one made before."""

    def __init__(self):
        super().__init__()
        self.made, self.remembered = set(), 0

    def render(self, request):
        key = (request.prompt, request.seed, None if request.ink is None else request.ink.tobytes())
        cached = key in self.made
        self.made.add(key)
        self.remembered += cached
        spent = {stage: 0.0 if cached else 10.25 + i for i, stage in enumerate(STAGES)}
        return replace(super().render(request), stages_ms=spent | {"total": 0.3 if cached else 1234.0}, cached=cached)


SPENT = ["prompt 10", "lines 11", "condition 12", "ControlNet 13", "transformer 14", "decode 15", "JPEG 16 ms"]


def test_a_picture_made_before_is_no_measure_of_the_model(tab):
    engine = RememberingEngine()
    with served(engine) as (_, url):
        pad = tab(url)
        pad.stroke(*LINE)
        pad.settle()
        assert re.match(r"model 1234 ms · total \d+ ms", pad.page.inner_text(".sp-times"))
        before, seq = engine.remembered, pad.seq
        pad.click("undo")
        pad.after(seq)
        pad.settle()
        assert engine.remembered > before and re.match(r"model 1234 ms · total \d+ ms", pad.page.inner_text(".sp-times"))
        assert pad.page.locator(".sp-stages span").all_inner_texts() == SPENT
        before, second = engine.remembered, tab(url)  # it opens with the drawing that the first one opened with
        assert engine.remembered > before and re.match(r"total \d+ ms", second.page.inner_text(".sp-times"))


STEER = """async () => { LIVE_JS
    let reply;
    const server = { mint: () => ({ token: "t" }), frame: () => ({ status: 200, jpeg: btoa("x"), headers: reply }) };
    const nothing = () => {};
    const live = new Live({ root: "", slowMs: 1e9, server, onPicture: nothing, onState: nothing, onStale: nothing,
        snapshot: () => ({ side: 1, ink: new Uint8Array(1), settings: {} }) });
    live.viaServer = true;
    const found = [];
    for (const [total, cached] of [[0.1, "1"], [0.1, "1"], [1e7], [1e7], [0.1, "1"], [0.1, "1"], [0.1, "1"], [0.1], [0.1], [0.1]]) {
        reply = { "x-sketch-stages": JSON.stringify({ total }), "x-sketch-cached": cached };
        await live.send(++live.seq, live.snapshot());
        found.push([live.modelMs, live.mayFly]);
    }
    return found;
}"""


def test_pictures_made_before_do_not_steer_the_requests(pad):
    """A model of hours, or none measured yet, has one request in flight, however fast pictures come from memory."""
    source = (Path(pad_module.__file__).parent / "live.js").read_text(encoding="utf-8")
    found = pad.page.evaluate(STEER.replace("LIVE_JS", source))
    assert found[:7] == [[None, 1]] * 2 + [[1e7, 1]] * 5 and found[-1] == [0.1, 2]


@pytest.mark.parametrize("options", [
    {"viewport": {"width": 1280, "height": 900}},
    {"viewport": {"width": 360, "height": 780}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2},
], ids=["desktop", "phone"])
def test_the_stages_can_be_read_without_a_mouse_in_light_and_dark(tab, options):
    colours = set()
    with served(RememberingEngine()) as (_, url):
        for scheme, line in {"light": LINE, "dark": LOW_LINE}.items():  # two drawings: what is in memory has no times
            pad = tab(url, color_scheme=scheme, **options)
            pad.stroke(*line)
            pad.settle()
            stages = pad.page.locator(".sp-stages span")
            assert stages.all_inner_texts() == SPENT
            places = [stage.bounding_box() for stage in stages.all()]
            assert all(p["x"] >= 0 and p["x"] + p["width"] <= options["viewport"]["width"] for p in places)
            assert len({p["y"] for p in places}) <= 2 and pad.page.evaluate("document.documentElement.scrollWidth") <= options["viewport"]["width"]
            colours.add(stages.first.evaluate("e => getComputedStyle(e).color"))
    assert len(colours) == 2


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
