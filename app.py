"""Sana Sketch: `python app.py`, then draw. As a Hugging Face Space this folder runs as it is."""

from __future__ import annotations

import os
import sys
import time

STARTED = time.perf_counter()
# Before torch is imported: its OpenMP threads would spin, and one busy neighbour then costs a factor of four.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import argparse  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402


def create(model: str, lora: str = ""):
    """The page (gr.Blocks) for a preset name or a model folder, and PATH[:SCALE] of a LoRA adapter; ValueError says what is wrong."""
    from sana_app.presets import find_model

    preset = find_model(model)  # a wrong name is refused before diffusers and gradio are imported
    if lora:
        from sana_app.model.adapter import adapter_file, parse_adapter

        adapter_file(parse_adapter(lora)[0])  # a wrong path before the model is loaded
    from sana_app.engine import Engine
    from sana_app.ui import build_page

    engine = Engine.load(preset, lora=lora)
    if engine.adapter is not None and engine.adapter.captions:
        print(f"Adapter {engine.adapter.label}: it was trained on “{'”, “'.join(engine.adapter.captions[:3])}”", flush=True)
    return build_page(engine)


def __getattr__(name: str):
    """`from app import demo`: built when it is asked for, with the model named by SANA_MODEL and the adapter by SANA_LORA."""
    if name != "demo":
        raise AttributeError(f"module 'app' has no attribute {name!r}")
    globals()["demo"] = create(os.environ.get("SANA_MODEL", "emoji"), os.environ.get("SANA_LORA", ""))
    return globals()["demo"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Draw, and a picture follows your pen.")
    parser.add_argument("--model", default=os.environ.get("SANA_MODEL", "emoji"),
                        help="emoji (shipped), sprint-0.6b, sprint-1.6b, or a model folder (default: %(default)s)")
    parser.add_argument("--lora", metavar="PATH[:SCALE]", default=os.environ.get("SANA_LORA", ""),
                        help="a LoRA adapter (.safetensors file or its folder) on top of the model, at this scale (default 1)")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="default: %(default)s")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public gradio.live link")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for this login")
    args = parser.parse_args(argv)
    if args.auth is not None:
        user, colon, password = args.auth.partition(":")
        if not (user and colon and password):
            parser.error(f"--auth: USER:PASSWORD is wanted, got {len(args.auth)} characters without both parts")
        args.auth = (user, password)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port: a number from 1 to 65535 is wanted, got {args.port}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        page = create(args.model, args.lora)
        _, url, shared = page.launch(server_name=args.host, server_port=args.port, share=args.share, auth=args.auth,
                                     prevent_thread_lock=True, quiet=True)
    except (ValueError, OSError) as error:  # a wrong model, a port in use: one message, no traceback
        print(f"Sana Sketch cannot start: {error}", file=sys.stderr, flush=True)
        return 2
    print(f"Sana Sketch is ready: {(shared or url).rstrip('/')} ({time.perf_counter() - STARTED:.0f} s)", flush=True)
    over = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: over.set())
    over.wait()
    page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
