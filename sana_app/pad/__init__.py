"""The sketch pad: the drawing page and the picture beside it, as one gr.HTML component.

Pixels never pass through Gradio: the pad posts its ink to the live route (see sana_app/live.py), and where that route
is not to be had (another app mounts the page, a proxy refuses it) to the server function `frame`.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import gradio as gr

from sana_app.live import BODY_BYTES, LiveService, refusal, token_that_came
from sana_app.request import PROMPT_CHARS, shown

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent.parent / "assets" / "examples"


def read_examples() -> list[dict]:
    """The drawn examples: {title, prompt, style, seed, strokes: [{size, points}]}, points on a 512 x 512 page."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(EXAMPLES.glob("*.json"))]


def sketch_pad(service: LiveService, *, examples: list[dict], settings: dict, side: int, slow_ms: int = 400, **kwargs) -> gr.HTML:
    """`side`: of the ink raster, 256 or 512. `settings`: the controls' first values. `slow_ms`: of a round trip, see live.js.

    A function and not a subclass: for every subclass of a component Gradio writes a .pyi file beside its source.
    """

    async def mint(_) -> dict:  # Gradio checks the login before it calls a server function
        return {"token": service.tokens.mint()}

    async def frame(payload) -> dict:
        return await answer_through_gradio(service, payload)

    return gr.HTML(
        value=None,
        html_template=(HERE / "pad.html").read_text(encoding="utf-8"),
        css_template=(HERE / "pad.css").read_text(encoding="utf-8"),
        js_on_load="\n".join((HERE / name).read_text(encoding="utf-8") for name in ("strokes.js", "live.js", "pad.js")),
        apply_default_css=False,
        server_functions=[mint, frame],
        examples=examples, settings=settings, side=side, slow_ms=slow_ms, prompt_chars=PROMPT_CHARS, picture=None,
        **kwargs,
    )


def show_first(pad: gr.HTML, jpeg: bytes) -> None:
    """The picture the page opens with, before its first request."""
    pad.props["picture"] = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


async def answer_through_gradio(service: LiveService, payload) -> dict:
    """A live frame as JSON in, JSON out: {"token", "body": base64} -> {"status", "headers", "jpeg" | "error"}."""
    token, text = (payload.get("token"), payload.get("body")) if isinstance(payload, dict) else (None, None)
    if not isinstance(token, str) or not service.tokens.known(token):
        reply = refusal(401, "a token of this server is wanted, got " + token_that_came(token))
    elif not isinstance(text, str) or len(text) > BODY_BYTES * 4 // 3 + 4:
        got = f"{len(text)} characters" if isinstance(text, str) else shown(text)
        reply = refusal(413, f"body: base64 text of at most {BODY_BYTES} bytes is wanted, got {got}; undo a part of the drawing or clear it")
    else:
        try:
            reply = await service.answer(token, base64.b64decode(text, validate=True))
        except ValueError as error:  # binascii.Error, and letters outside ASCII
            reply = refusal(400, f"body: base64 text is wanted, got {len(text)} characters that are none ({error})")
    answer = {"status": reply.status, "headers": reply.headers}
    if reply.status == 200:
        answer["jpeg"] = base64.b64encode(reply.content).decode()
    elif reply.content:
        answer["error"] = json.loads(reply.content)["error"]
    return answer
