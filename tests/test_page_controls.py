"""The controls around the pad, the keys, hostile text, and a server that goes away: in a real browser."""

import socket

import numpy as np
import pytest
from browser import LINE, LOW_LINE, WAIT_MS, Pad, chromium, pad, served, tab, url  # noqa: F401
from gradio.context import Context

pytestmark = pytest.mark.browser


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
