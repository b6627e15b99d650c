"""The program: its start, its refusals, its one public endpoint, its login, and that it never calls anybody."""

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from browser import served, slowdown
from echo_engine import EchoEngine
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from layouts import build_small_folder
from PIL import Image

import app
from sana_app.body_limit import ANY_BODY_BYTES
from sana_app.live import LIVE_PATH
from sana_app.request import RenderRequest
from sana_app.ui import read_sketch

ROOT = Path(app.__file__).parent
START_S = 120

# Every connection and name look-up of the program, printed if it leaves the machine.
WATCHED = """
import runpy, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0]
        if event == "socket.connect" and not isinstance(args[1], tuple):
            return
        if host not in ("127.0.0.1", "localhost", "::1", None, ""):
            print("OUTSIDE", event, host, flush=True)
sys.addaudithook(watch)
sys.argv = ["app.py", *sys.argv[1:]]
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_small_folder(tmp_path_factory.mktemp("models") / "small")


class Program:
    """`python app.py ...` as a stranger starts it: nothing set that would keep it from going outside."""

    def __init__(self, *args, start=("-c", WATCHED)):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "GRADIO_"))}
        self.process = subprocess.Popen([sys.executable, "-u", *start, *args], cwd=ROOT, text=True, env=env,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines = []

    def ready(self, limit_s: float = START_S) -> str:
        """The address, once it is printed; `limit_s` are seconds of a machine that has time for it."""
        begun, waited_s = time.monotonic(), limit_s
        while True:
            if not select.select([self.process.stdout], [], [], max(0.0, begun + waited_s - time.monotonic()))[0]:
                waited_s = limit_s * max(1.0, slowdown())  # asked only when late: a starved machine gets its time
                if time.monotonic() - begun > waited_s:
                    break
                continue
            line = self.process.stdout.readline()
            self.lines.append(line)
            if found := re.match(r"Sana Sketch is ready: (http://127\.0\.0\.1:\d+) \(\d+ s\)", line):
                return found.group(1)
            if not line:
                break
        self.process.kill()  # no test is to leave a program behind
        raise AssertionError("not ready:\n" + "".join(self.lines))

    def end(self, name=signal.SIGTERM) -> int:
        self.process.send_signal(name)
        rest, _ = self.process.communicate(timeout=START_S)
        self.lines.append(rest)
        return self.process.returncode


@pytest.fixture(scope="module")
def program(folder):
    program = Program("--model", str(folder))
    program.url = program.ready()
    yield program
    if program.process.poll() is None:
        program.end()


@pytest.fixture(scope="module")
def client(program):
    client = Client(program.url, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def sketch(tmp_path_factory):
    page = np.full((300, 300), 255, np.uint8)
    page[100:110, 40:260] = 0
    path = tmp_path_factory.mktemp("sketch") / "sketch.png"
    Image.fromarray(page).save(path)
    return handle_file(str(path))


def test_generate_is_the_one_public_endpoint(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert list(named) == ["/generate"]
    assert [p["parameter_name"] for p in named["/generate"]["parameters"]] == [
        "sketch", "prompt", "style", "strength", "steps", "seed", "guidance"]


def test_generate_gives_a_picture_that_follows_sketch_and_seed(client, sketch):
    def generate(sketch, seed):
        picture, info = client.predict(sketch, "a red apple", "none", 1.0, 1, seed, 4.5, api_name="/generate")
        assert info["seed"] == seed and info["stages_ms"]["total"] > 0 and info["notices"] == []
        with Image.open(picture) as image:
            assert image.format == "PNG" and image.size == (32, 32)
            return np.asarray(image)

    first = generate(sketch, 7)
    assert np.array_equal(first, generate(sketch, 7))
    assert not np.array_equal(first, generate(sketch, 8)) and not np.array_equal(first, generate(None, 7))


@pytest.mark.parametrize("change, message", [
    ({"strength": -1}, "strength: a number from 0 to 2 is wanted, got -1"), ({"seed": 2**31}, "seed: a number from 0 to 2147483647"),
    ({"steps": 3}, "steps: 1, 2 or 4 is wanted, got 3"), ({"style": "baroque"}, "style: one of none, .* is wanted, got 'baroque'"),
    ({"guidance": None}, "guidance: a number from 0 to 20 is wanted, got None"), ({"seed": 1e300}, "seed: a number"),
    ({"seed": 1.5}, "seed: a whole number"), ({"strength": float("nan")}, "strength|JSON"), ({"guidance": float("inf")}, "guidance|JSON"),
    ({"strength": "much"}, "much"), ({"prompt": None}, "prompt: text is wanted"),
], ids=str)
def test_generate_refuses_bad_numbers_and_goes_on(client, sketch, change, message):
    values = {"prompt": "a", "style": "none", "strength": 1.0, "steps": 1, "seed": 1, "guidance": 4.5}
    with pytest.raises((AppError, ValueError), match=message):
        client.predict(sketch, *(values | change).values(), api_name="/generate")
    assert client.predict(sketch, *values.values(), api_name="/generate")[1]["seed"] == 1


def test_generate_refuses_what_is_no_picture(client, tmp_path):
    bomb = tmp_path / "bomb.png"  # 13,000 x 13,000 white pixels in a few kB
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 13000, 13000, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    text, svg = tmp_path / "text.png", tmp_path / "lines.svg"
    text.write_text("not a picture"), svg.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for path in (bomb, text, svg):
        with pytest.raises(AppError):
            client.predict(handle_file(str(path)), "a", "none", 1.0, 1, 1, 4.5, api_name="/generate")


def test_a_refused_picture_is_named_by_what_came(tmp_path):
    text, bomb = tmp_path / "text.png", tmp_path / "bomb.png"
    text.write_text("not a picture")
    Image.new("1", (8000, 5000)).save(bomb)
    with pytest.raises(ValueError, match="PNG, JPEG or WebP picture is wanted, got 13 bytes that are none .*; save the drawing as PNG"):
        read_sketch(str(text))
    with pytest.raises(ValueError, match="no file; save"):
        read_sketch(str(tmp_path / "nowhere.png"))
    with pytest.raises(ValueError, match="at most 16 million pixels are wanted, got a picture of more; scale it down"):
        read_sketch(str(bomb))


class HeldEngine(EchoEngine):
    """Renders while `opened` is set, and waits for that otherwise."""

    def __init__(self):
        super().__init__()
        self.begun, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def render(self, request):
        self.begun.set()
        assert self.opened.wait(START_S)
        return super().render(request)


def test_a_generate_that_took_too_long_is_withdrawn(monkeypatch):
    engine = HeldEngine()
    monkeypatch.setattr("sana_app.ui.JOB_LIMIT_S", 0.2)
    with served(engine) as (demo, url):
        worker, client = demo.service.worker, Client(url, verbose=False)
        engine.opened.clear(), engine.begun.clear()
        try:
            held = worker.submit("a tab", RenderRequest(ink=None))
            assert engine.begun.wait(START_S)
            with pytest.raises(AppError, match="no picture came within"):
                client.predict(None, "a", "none", 1.0, 1, 1, 4.5, api_name="/generate")
            assert not worker.waiting, "its place is free"
        finally:
            engine.opened.set()
            client.close()
        held.result(START_S)
        assert engine.rendered == 2, "the page's first picture and the tab's; nothing for the client that was told no"


def test_no_json_body_over_16_mb_is_read_by_gradios_routes():
    most, paths = ANY_BODY_BYTES, ["run/generate", "call/generate", "queue/join", "component_server"]

    async def endless():
        for sent in range(0, 4 * most, 1 << 20):
            assert sent <= most + (1 << 20), "the whole body was read"
            yield b" " * (1 << 20)

    async def stream(app, base):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
            return [await client.post(f"/gradio_api/{path}", content=endless(), headers={"content-type": "application/json"}) for path in paths]

    with served() as (demo, url):
        replies = asyncio.run(stream(demo.app, url))
        assert [reply.status_code for reply in replies] == [413] * len(paths)
        assert all("at most 16777216 bytes are wanted, got more" in reply.json()["error"] for reply in replies)
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=START_S) as line:  # refused before a byte of it is sent
            line.sendall(f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {most + 1}\r\n\r\n".encode())
            assert line.recv(64).startswith(b"HTTP/1.1 413 ")
        within = httpx.post(f"{url}gradio_api/queue/join", content=b" " * (most - 100), timeout=START_S)
        assert within.status_code != 413


def test_an_endless_prompt_is_cut_and_said(client, sketch):
    info = client.predict(sketch, "red " * 20_000, "none", 1.0, 1, 1, 4.5, api_name="/generate")[1]
    assert any("500 characters" in notice for notice in info["notices"])


def test_the_live_route_asks_for_a_token(program):
    assert httpx.post(program.url + LIVE_PATH, content=b"x").status_code == 401
    assert httpx.get(program.url + LIVE_PATH).status_code in (404, 405)


def test_the_program_starts_warm_goes_nowhere_outside_and_ends_on_a_signal(program, client, sketch):
    client.predict(sketch, "a", "none", 1.0, 1, 1, 4.5, api_name="/generate")
    began = time.monotonic()
    assert program.end() == 0
    took_s = time.monotonic() - began
    assert took_s < 10 or took_s < 10 * slowdown()  # a starved machine is no slow program
    output = "".join(program.lines)
    assert "OUTSIDE" not in output and "Traceback" not in output, output


def test_plain_app_py_opens_the_shipped_model_and_says_where():
    """The aim is 30 s on a quiet machine; a busy one gets three times that, and more where it is starved."""
    begun, program = time.monotonic(), Program(start=("app.py",))
    try:
        address = program.ready(limit_s=90)
        print(f"ready after {time.monotonic() - begun:.0f} s at {address}")
        page = httpx.get(address, timeout=START_S)
        assert page.status_code == 200 and "emoji \u00b7 128 px" in page.text.replace("\\u00b7", "\u00b7")
    finally:
        ended = program.end()
    assert ended == 0 and "Traceback" not in "".join(program.lines)


def half_written(folder, to):
    shutil.copytree(folder, to)
    weights = next((to / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return to


def without(folder, to, part):
    shutil.copytree(folder, to)
    shutil.rmtree(to / part)
    return to


def test_a_wrong_start_gives_one_message_and_code_2(folder, tmp_path, capsys):
    broken = {
        "emojii": "no model is called 'emojii'. Wanted: one of emoji",
        str(tmp_path / "nowhere"): "no model folder at .*nowhere",
        str(half_written(folder, tmp_path / "half")): "transformer/diffusion_pytorch_model.safetensors",
        str(without(folder, tmp_path / "parts", "vae")): "vae",
        str(tmp_path): "model_index.json",
    }
    for model, message in broken.items():
        assert app.main(["--model", model]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1 and "Traceback" not in said
    for arguments in (["--auth", "nocolon"], ["--auth", ":x"], ["--port", "0"], ["--port", "x"]):
        with pytest.raises(SystemExit) as ended:
            app.main(arguments)
        assert ended.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_a_taken_port_gives_one_message_and_code_2(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert app.main(["--model", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert str(taken) and "port" in capsys.readouterr().err


def test_from_the_command_line_a_wrong_model_ends_with_code_2_and_no_traceback():
    ended = subprocess.run([sys.executable, "app.py", "--model", "sprint-9b"], cwd=ROOT, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "sprint-9b" in ended.stderr and "sprint-0.6b" in ended.stderr


def test_demo_brings_its_live_route_whoever_launches_it(folder, monkeypatch):
    import gradio as gr

    monkeypatch.setenv("SANA_MODEL", str(folder))
    app.__dict__.pop("demo", None)
    demo = app.demo
    assert isinstance(demo, gr.Blocks) and app.demo is demo
    try:
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
        assert httpx.post(url.rstrip("/") + LIVE_PATH, content=b"x").status_code == 401
    finally:
        demo.close(verbose=False)
        app.__dict__.pop("demo", None)


def ask_mint(client, demo):
    pad = next(i for i, block in demo.blocks.items() if block.elem_id == "sketch-pad")
    return client.post("/gradio_api/component_server",
                       json={"data": [], "component_id": pad, "fn_name": "mint", "session_hash": "s"})


def a_frame() -> bytes:
    header = json.dumps({"width": 256, "height": 256}).encode()
    return struct.pack(">I", len(header)) + header + zlib.compress(bytes(256 * 256))


def test_with_a_login_nothing_answers_before_it():
    with served(auth=("ann", "secret")) as (demo, url), httpx.Client(base_url=url) as client:
        api = "/gradio_api"
        closed = [client.get(f"{api}/info"), client.get("/config"), client.post(f"{api}/queue/join", json={}),
                  client.post(f"{api}/upload", files={"files": b"x"}), client.post(f"{api}/run/generate", json={"data": []}),
                  client.post(f"{api}/call/generate", json={"data": []}), client.get(f"{api}/queue/status"),
                  client.get(f"{api}/file=app.py"), ask_mint(client, demo), client.post(LIVE_PATH, content=a_frame())]
        assert {r.request.url.path: r.status_code for r in closed if r.status_code != 401} == {}
        assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
        token = ask_mint(client, demo).json()["token"]
        reply = client.post(LIVE_PATH, content=a_frame(), headers={"x-sketch-token": token})
        assert reply.status_code == 200 and reply.headers["content-type"] == "image/jpeg"


def test_only_the_user_interface_imports_gradio():
    importing = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sana_app").rglob("*.py")
                 if re.search(r"^\s*(import|from) gradio", p.read_text(), re.M)}
    assert importing <= {"sana_app/ui.py", "sana_app/pad/__init__.py"}
