"""The live route: what it accepts, what it refuses and how cheaply, and that no tab sees another's picture."""

import asyncio
import io
import json
import random
import re
import struct
import threading
import time
import tracemalloc
import zlib
from dataclasses import replace

import httpx
import numpy as np
import pytest
from echo_engine import EchoEngine
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request

from sana_app.live import BODY_BYTES, LIVE_PATH, LiveService, TokenBook, inflate
from sana_app.pad import answer_through_gradio
from sana_app.worker import RenderWorker

SIDE = 256
BASE = "http://testserver"


@pytest.fixture
def engine():
    return EchoEngine()


@pytest.fixture
def service(engine):
    worker = RenderWorker(engine.render)
    yield LiveService(worker, tuple(engine.styles))
    worker.stop()


def drawing(seed: int = 0) -> np.ndarray:
    """A few random strokes, uint8 [SIDE, SIDE], 255 = ink."""
    rng, ink = np.random.default_rng(seed), np.zeros((SIDE, SIDE), np.uint8)
    for x, y in rng.integers(20, SIDE - 60, (4, 2)):
        ink[y:y + 6, x:x + 40] = 255
    return ink


def body(ink: np.ndarray | bytes, header: dict | bytes | None = None, **fields) -> bytes:
    if not isinstance(header, bytes):
        header = json.dumps({"seq": 1, "width": SIDE, "height": SIDE, "prompt": "a cat", **(header or {}), **fields}).encode()
    packed = ink if isinstance(ink, bytes) else zlib.compress(ink.tobytes())
    return struct.pack(">I", len(header)) + header + packed


async def post(service, *bodies, token=None, **headers):
    """Post bodies side by side through the real route; one reply each."""
    app = Starlette(routes=service.routes())
    token = token or service.tokens.mint()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        return await asyncio.gather(*(
            client.post(LIVE_PATH, content=b, headers={"x-sketch-token": token, **headers}) for b in bodies))


def send(service, content, **kwargs) -> httpx.Response:
    return asyncio.run(post(service, content, **kwargs))[0]


def picture(reply: httpx.Response) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(reply.content)).convert("L")).astype(int)


def test_a_frame_comes_back_as_the_picture_of_its_own_sketch(service):
    ink = drawing()
    reply = send(service, body(ink, seq=41))
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/jpeg"
    assert reply.headers["x-sketch-seq"] == "41" and "total" in json.loads(reply.headers["x-sketch-stages"])
    assert np.abs(picture(reply) - (255 - ink)).mean() < 2


def test_a_too_long_prompt_is_cut_and_the_reply_says_so(service):
    reply = send(service, body(drawing(), prompt="é" * 600))
    assert reply.status_code == 200 and "500 characters" in json.loads(reply.headers["x-sketch-notices"])[0]


REFUSED = {
    "empty body": b"",
    "no header": b"\x00\x00",
    "header longer than the body": struct.pack(">I", 4000) + b"{}",
    "header of 4 GB": struct.pack(">I", 2**32 - 1) + b"{}",
    "header not JSON": body(drawing(), b"{nope"),
    "header not UTF-8": body(drawing(), b"\xff\xfe\x00"),
    "header a list": body(drawing(), b"[1, 2]"),
    "header nested past the parser": body(drawing(), b"[" * 8000),
    "wrong size": body(drawing(), width=300, height=300),
    "size not square": body(drawing(), width=512),
    "size not whole": body(drawing(), width=256.0, height=256.0),
    "size a list": body(drawing(), width=[256], height=[256]),
    "negative seq": body(drawing(), seq=-1),
    "raster too short": body(zlib.compress(b"\0" * 100)),
    "raster too long": body(zlib.compress(b"\0" * (SIDE * SIDE + 1))),
    "raster cut short": body(zlib.compress(drawing().tobytes())[:-9]),
    "raster with a tail": body(zlib.compress(drawing().tobytes()) + b"tail"),
    "raster garbage": body(bytes(range(256)) * 8),
    "prompt a number": body(drawing(), prompt=7),
    "prompt a list": body(drawing(), prompt=["a"]),
    "unknown style": body(drawing(), style="baroque"),
    "style a dict": body(drawing(), style=None),
    **{f"{name} {value}": body(drawing(), body_header) for name, value, body_header in [
        (name, value, json.dumps({"width": SIDE, "height": SIDE, name: value}).encode())
        for name, values in {
            "strength": [float("nan"), float("inf"), -0.1, 2.1, 1e308, "1", None, True, [1]],
            "guidance": [float("nan"), float("-inf"), -1, 1e9, "4"],
            "steps": [0, 3, -1, 5, 1.5, 10**30, "1", float("nan")],
            "seed": [-1, 2**31, 1.5, 10**40, "7", float("inf")],
        }.items() for value in values]},
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_a_malformed_frame_is_refused_by_name(service, engine, content):
    reply = send(service, content)
    assert reply.status_code == 400 and len(reply.json()["error"]) > 10
    assert engine.rendered == 0, "nothing malformed may reach the model"


def test_the_server_goes_on_after_two_hundred_odd_payloads(service):
    rng, good = random.Random(7), bytearray(body(drawing(3)))
    odd = []
    for _ in range(200):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 12)):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        odd.append(bytes(mutant[: rng.choice([len(mutant), rng.randrange(len(mutant))])]))
    replies = asyncio.run(post(service, *odd))
    assert {r.status_code for r in replies} <= {200, 204, 400}
    assert sum(r.status_code == 400 for r in replies) > 150
    assert send(service, bytes(good)).status_code == 200


def test_a_body_over_the_bound_is_refused_without_reading_it(service):
    assert send(service, b"x" * (BODY_BYTES + 1)).status_code == 413

    async def endless():
        for _ in range(10_000):
            yield b"x" * 1024
        raise AssertionError("the whole body was read")

    assert send(service, endless()).status_code == 413


def test_a_picture_made_before_is_marked_as_such(service, engine):
    render = engine.render
    for cached in (False, True, False):
        service.worker.render = lambda request: replace(render(request), cached=cached)  # noqa: B023 (used within the turn)
        assert send(service, body(drawing())).headers.get("x-sketch-cached") == ("1" if cached else None)


def test_a_refusal_names_what_came_and_what_to_do(service):
    def said(content=b"", **headers):
        return send(service, content, **headers).json()["error"]

    assert "got 5 bytes" in said(body(drawing(), b"{nope")) and "got 3 bytes" in said(body(drawing(), b"\xff\xfe\x00"))
    assert "got -1" in said(body(drawing(), seq=-1)) and "got '7'" in said(body(drawing(), seq="7"))
    assert re.search("got none; reload", said(**{"x-sketch-token": ""})) and re.search("unknown or has expired; reload", said(token="x"))
    assert re.search("got one from 'https://evil.example'; open", said(origin="https://evil.example"))
    assert re.search(f"{BODY_BYTES} bytes are wanted, got more; undo", said(b"x" * (BODY_BYTES + 1)))
    assert re.search("content-length: a whole number is wanted, got 'many'; send", said(b"x", **{"content-length": "many"}))
    through_gradio = lambda **payload: asyncio.run(answer_through_gradio(service, payload))["error"]  # noqa: E731
    token = service.tokens.mint()
    assert "got none; reload" in through_gradio(body="A") and "unknown or has expired; reload" in through_gradio(token="x")
    assert "got 7; undo" in through_gradio(token=token, body=7) and "got 100000 characters; undo" in through_gradio(token=token, body="A" * 100_000)
    assert "got 40 characters that are none" in through_gradio(token=token, body="*" * 40)
    assert "got 2 characters that are none" in through_gradio(token=token, body="éé")


def test_a_client_that_leaves_before_the_end_of_its_body_is_told_what_was_missing(service):
    async def half():
        messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        headers = [(b"x-sketch-token", service.tokens.mint().encode())]
        return await service.handle(Request({"type": "http", "method": "POST", "headers": headers}, receive))

    reply = asyncio.run(half())
    assert reply.status_code == 400 and "got a part of it" in json.loads(reply.body)["error"]


def test_an_inflate_bomb_costs_no_memory_and_no_time():
    bomb = zlib.compress(b"\0" * 60_000_000, 9)
    assert len(bomb) < BODY_BYTES
    tracemalloc.start()
    start = time.process_time()  # of this process alone: a busy neighbour does not count
    with pytest.raises(ValueError, match="more than 65536"):
        inflate(bomb, SIDE * SIDE)
    took_ms, (_, peak) = 1e3 * (time.process_time() - start), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 and took_ms < 50


@pytest.mark.parametrize("headers", [
    {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://testserver.evil.example"},
    {"origin": "http://testserver:81"}, {"sec-fetch-site": "cross-site"},
    {"origin": "http://evil.example", "sec-fetch-site": "same-site"},
], ids=str)
def test_a_foreign_page_is_refused(service, headers):
    assert send(service, body(drawing()), **headers).status_code == 403


@pytest.mark.parametrize("headers", [
    {}, {"origin": BASE}, {"origin": "https://abc.gradio.live", "x-forwarded-host": "abc.gradio.live"},
    {"origin": "https://any.proxy", "sec-fetch-site": "same-origin"},
], ids=str)
def test_our_own_page_is_accepted(service, headers):
    assert send(service, body(drawing()), **headers).status_code == 200


@pytest.mark.parametrize("token", ["", "wrong", "x" * 4000])
def test_without_a_token_of_this_server_nothing_is_rendered(service, engine, token):
    async def bare():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Starlette(routes=service.routes())), base_url=BASE) as c:
            return await c.post(LIVE_PATH, content=body(drawing()), headers={"x-sketch-token": token} if token else {})

    assert asyncio.run(bare()).status_code == 401 and engine.rendered == 0


def test_tokens_expire_when_idle_and_are_bounded_in_number():
    now = [0.0]
    book = TokenBook(capacity=3, idle_s=10, clock=lambda: now[0])
    old, kept = book.mint(), book.mint()
    now[0] = 8
    assert book.known(kept)
    now[0] = 12
    assert book.known(kept) and not book.known(old)
    others = [book.mint() for _ in range(3)]
    assert len({kept, *others}) == 4 and all(book.known(t) for t in others) and not book.known(kept)


def test_no_tab_ever_gets_the_picture_of_another(engine):
    """24 tabs draw 10 frames each at the same time; each reply shows the tab's own sketch."""
    worker = RenderWorker(engine.render)
    service = LiveService(worker, tuple(engine.styles))

    async def tab(number):
        token, mine = service.tokens.mint(), []
        for frame in range(10):
            ink = drawing(1000 * number + frame)
            (reply,) = await post(service, body(ink, seq=frame), token=token)
            mine.append(reply.status_code == 200 and int(reply.headers["x-sketch-seq"]) == frame
                        and np.abs(picture(reply) - (255 - ink)).mean() < 2)
        return mine

    async def everybody():
        return await asyncio.gather(*(tab(number) for number in range(24)))

    assert np.all(asyncio.run(everybody()))
    worker.stop()


async def answered(tasks: list[asyncio.Task], count: int) -> None:
    while sum(task.done() for task in tasks) < count:
        await asyncio.sleep(0.001)


def test_of_a_burst_from_one_tab_the_last_frame_is_rendered_and_the_rest_may_be_superseded():
    engine, go = EchoEngine(), threading.Event()
    worker = RenderWorker(lambda request: (go.wait(60), engine.render(request))[1])
    service = LiveService(worker, tuple(engine.styles))

    async def burst():
        tab = service.tokens.mint()
        tasks = [asyncio.create_task(post(service, body(drawing(i), seq=i), token=tab)) for i in range(30)]
        await answered(tasks, 28)  # all but the one that is being drawn and the newest
        go.set()
        return [r for (r,) in await asyncio.gather(*tasks)]

    replies = asyncio.run(asyncio.wait_for(burst(), 60))
    worker.stop()
    assert replies[-1].status_code == 200 and {r.status_code for r in replies} == {200, 204}
    assert engine.rendered == sum(r.status_code == 200 for r in replies) <= 2


def test_when_too_many_tabs_wait_the_next_is_asked_to_come_back():
    engine, started, go = EchoEngine(), threading.Event(), threading.Event()
    worker = RenderWorker(lambda request: (started.set(), go.wait(60), engine.render(request))[2], max_tabs=2)
    service = LiveService(worker, tuple(engine.styles))

    async def many():
        tasks = [asyncio.create_task(post(service, body(drawing(0))))]
        await asyncio.to_thread(started.wait)  # one is being drawn, two may wait
        tasks += [asyncio.create_task(post(service, body(drawing(i)))) for i in range(1, 8)]
        await answered(tasks, 5)
        go.set()
        return [r for (r,) in await asyncio.gather(*tasks)]

    replies = asyncio.run(asyncio.wait_for(many(), 60))
    worker.stop()
    refused = [r for r in replies if r.status_code == 503]
    assert len(refused) == 5 and all(int(r.headers["retry-after"]) >= 1 for r in refused)
    assert [r.status_code for r in replies].count(200) == 3


def test_a_failing_model_answers_500_and_the_next_frame_is_served(service, engine):
    render = engine.render
    service.worker.render = lambda request: (_ for _ in ()).throw(MemoryError("out of memory"))
    assert send(service, body(drawing())).status_code == 500
    service.worker.render = render
    assert send(service, body(drawing())).status_code == 200


def test_the_server_function_makes_the_same_checks(service):
    import base64

    token, good = service.tokens.mint(), base64.b64encode(body(drawing(), seq=5)).decode()
    ask = lambda payload: asyncio.run(answer_through_gradio(service, payload))  # noqa: E731
    answer = ask({"token": token, "body": good})
    assert answer["status"] == 200 and answer["headers"]["x-sketch-seq"] == "5"
    direct = send(service, body(drawing(), seq=5))
    assert base64.b64decode(answer["jpeg"]) == direct.content
    wrong = [None, [], "x", {}, {"token": "no", "body": good}, {"token": token}, {"token": token, "body": 7},
             {"token": token, "body": "*" * 40}, {"token": token, "body": "A" * 100_000}, {"token": [token], "body": good}]
    assert [ask(payload)["status"] for payload in wrong] == [401, 401, 401, 401, 401, 413, 413, 400, 413, 401]
