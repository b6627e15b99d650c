"""The live transport: one POST a frame, outside Gradio's queue, events and threads.

    body   = header length (uint32, big endian) | header (JSON, UTF-8) | ink (zlib: 8-bit raster, 255 = ink)
    header = {"seq", "width", "height", "prompt", "style", "strength", "steps", "seed", "guidance"}
    reply  = JPEG bytes; X-Sketch-Seq, X-Sketch-Stages (JSON, ms), X-Sketch-Notices (JSON), and X-Sketch-Cached: 1
             where the picture was one made before, and its times say nothing about the model
             204 = superseded by a newer frame of the same tab; 4xx/5xx = {"error": what came and what was wanted}

A route of our own is not covered by Gradio's login, CORS check or size limits (measured), so each is made here:
a token for the tab, minted behind the login; the Origin; bounds on the body and on the inflated raster.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import struct
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from sana_app.request import RenderRequest, check_request, shown
from sana_app.worker import Busy, RenderWorker, Superseded

LIVE_PATH = "/gradio_api/live/frame"  # this prefix survives share, root_path and Gradio's proxies
BODY_BYTES = 64 * 1024
HEADER_BYTES = 8 * 1024
RASTER_SIDES = (256, 512)
JOB_LIMIT_S = 30.0
NO_PICTURE = f"no picture came within {JOB_LIMIT_S:g} s: the model is slow or has many to serve; try again in 2 s"
FIELDS = ("prompt", "style", "strength", "steps", "seed", "guidance")


@dataclass
class Reply:
    """An HTTP answer before it is one: the route and the server-function fallback share it."""

    status: int
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, **headers: str) -> Reply:
    return Reply(status, json.dumps({"error": message}).encode(), {"content-type": "application/json", **headers})


class TokenBook:
    """Random tokens, one a tab; the least recently used are forgotten past `capacity` or after `idle_s` seconds."""

    def __init__(self, capacity: int = 512, idle_s: float = 3600.0, clock=time.monotonic):
        self.capacity, self.idle_s, self.clock = capacity, idle_s, clock
        self.last_use: OrderedDict[str, float] = OrderedDict()

    def mint(self) -> str:
        token = secrets.token_urlsafe(24)
        self.last_use[token] = self.clock()
        while len(self.last_use) > self.capacity:
            self.last_use.popitem(last=False)
        return token

    def known(self, token: str | None) -> bool:
        if not token or self.clock() - self.last_use.get(token, -float("inf")) > self.idle_s:
            return False
        self.last_use[token] = self.clock()
        self.last_use.move_to_end(token)
        return True


def inflate(data: bytes, size: int) -> bytes:
    """zlib data that must inflate to exactly `size` bytes; never holds more than that, whatever the data promise."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"ink: zlib data are wanted, got {len(data)} bytes that do not inflate ({error})") from None
    if len(raw) != size or inflater.unconsumed_tail or inflater.unused_data or not inflater.eof:
        came = f"more than {size}" if len(raw) > size else f"{len(raw)}"
        raise ValueError(f"ink: exactly {size} inflated bytes are wanted, got {came} (or data after the end)")
    return raw


def decode_frame(body: bytes, styles) -> tuple[int, RenderRequest]:
    """Body -> (seq, request); ValueError says what came and what was wanted."""
    if len(body) < 4:
        raise ValueError(f"body: at least 4 bytes are wanted, got {len(body)}")
    (length,) = struct.unpack(">I", body[:4])
    if length > min(HEADER_BYTES, len(body) - 4):
        raise ValueError(f"header: at most {HEADER_BYTES} bytes inside the body are wanted, got a length of {length}")
    try:
        header = json.loads(body[4:4 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header: a JSON object in UTF-8 is wanted, got {length} bytes that are none ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"header: a JSON object is wanted, got {type(header).__name__}")
    sides = header.get("width"), header.get("height")
    if sides[0] not in RASTER_SIDES or sides[0] != sides[1] or any(type(side) is not int for side in sides):
        raise ValueError(f"width, height: 256 x 256 or 512 x 512 is wanted, got {str(sides)[:60]}")
    seq = header.get("seq", 0)
    if type(seq) is not int or not 0 <= seq < 2**53:
        raise ValueError(f"seq: a whole number from 0 to 2**53 is wanted, got {shown(seq)}")
    ink = np.frombuffer(inflate(body[4 + length:], sides[0] * sides[1]), np.uint8).reshape(sides[1], sides[0])
    return seq, check_request(ink, **{k: header[k] for k in FIELDS if k in header}, styles=styles)


def same_origin(headers) -> bool:
    """Whether the page that sent this came from this server. Browsers set both headers; a page cannot forge them."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None:
        return site in (None, "same-origin", "none")
    if site == "same-origin":
        return True
    hosts = {h.strip().lower() for name in ("host", "x-forwarded-host") for h in headers.get(name, "").split(",")}
    return urlsplit(origin).netloc.lower() in hosts - {""}


def token_that_came(token) -> str:
    """What is said of a token that is not known; never the token itself."""
    return ("none" if not token else "one that is unknown or has expired") + "; reload the page to get one"


async def read_body(request: Request) -> bytes | None:
    """The body, or None as soon as it is longer than BODY_BYTES (the rest is never read)."""
    length = request.headers.get("content-length") or "0"
    if not length.isdecimal():
        raise ValueError(f"content-length: a whole number is wanted, got {shown(length)}; send the body's length in bytes")
    if int(length) > BODY_BYTES:
        return None
    parts, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


class LiveService:
    """Answers frames for one worker. `styles` are the model's style names."""

    def __init__(self, worker: RenderWorker, styles):
        self.worker, self.styles, self.tokens = worker, styles, TokenBook()

    def routes(self) -> list[Route]:
        return [Route(LIVE_PATH, self.handle, methods=["POST"])]

    async def handle(self, request: Request) -> Response:
        if not same_origin(request.headers):
            reply = refusal(403, f"frames are accepted from this server's own page only, got one from "
                                 f"{shown(request.headers.get('origin', 'another site'))}; open the page at this server's address")
        elif not self.tokens.known(token := request.headers.get("x-sketch-token")):
            reply = refusal(401, "a token of this server is wanted in X-Sketch-Token, got " + token_that_came(token))
        else:
            try:
                body = await read_body(request)
                reply = await self.answer(token, body, gone=asyncio.ensure_future(client_gone(request)))
            except ClientDisconnect:
                reply = refusal(400, "body: a whole frame is wanted, got a part of it before the connection ended; send it again")
            except ValueError as error:
                reply = refusal(400, str(error))
        return Response(reply.content, reply.status, {"cache-control": "no-store", **reply.headers})

    async def answer(self, tab: str, body: bytes | None, gone: asyncio.Future | None = None) -> Reply:
        """One frame of `tab` -> Reply. `gone` completes when the client has left; its place is then freed."""
        try:
            if body is None:
                return refusal(413, f"body: at most {BODY_BYTES} bytes are wanted, got more; undo a part of the drawing or clear it")
            try:
                seq, frame = decode_frame(body, self.styles)
                future = self.worker.submit(tab, frame)
            except ValueError as error:
                return refusal(400, str(error))
            except Busy as error:
                return refusal(503, str(error), **{"retry-after": str(error.retry_s)})
            return await self.wait(tab, seq, future, gone)
        finally:
            if gone is not None:
                gone.cancel()

    async def wait(self, tab: str, seq: int, future, gone: asyncio.Future | None) -> Reply:
        picture = asyncio.wrap_future(future)
        await asyncio.wait({picture, gone} if gone else {picture}, timeout=JOB_LIMIT_S,
                           return_when=asyncio.FIRST_COMPLETED)
        if not picture.done():
            self.worker.withdraw(tab, future)
            left = gone is not None and gone.done()
            return refusal(499, "the client has left") if left else refusal(
                504, NO_PICTURE, **{"retry-after": "2"})
        try:
            done = picture.result()
        except Superseded:
            return Reply(204, headers={"x-sketch-seq": str(seq), "x-sketch-state": "superseded"})
        except asyncio.CancelledError:
            return refusal(503, "the server is stopping and makes no more pictures; try again in 1 s", **{"retry-after": "1"})
        except Exception as error:
            print(f"a frame failed: {type(error).__name__}: {error}", flush=True)
            return refusal(500, "the model could not make this picture; change the drawing or the words if it stays so")
        return Reply(200, done.jpeg, {
            "content-type": "image/jpeg",
            "x-sketch-seq": str(seq),
            "x-sketch-stages": json.dumps({name: round(ms, 2) for name, ms in done.stages_ms.items()}),
            "x-sketch-notices": json.dumps(list(done.notices)),  # ASCII: JSON escapes the rest
            **({"x-sketch-cached": "1"} if done.cached else {}),
        })


async def client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
