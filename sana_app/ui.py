"""The page: stock Gradio controls around the pad. Controls reach the pad in the browser; the server sees frames only."""

from __future__ import annotations

import os
from uuid import uuid4

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw
from starlette.middleware import Middleware

from sana_app.body_limit import BodyLimit
from sana_app.lines import ink_from_rgb
from sana_app.live import JOB_LIMIT_S, NO_PICTURE, LiveService
from sana_app.pad import read_examples, show_first, sketch_pad
from sana_app.request import SEED_MAX, STEPS, STRENGTH_MAX, RenderRequest, check_request
from sana_app.worker import Busy, RenderWorker

Image.MAX_IMAGE_PIXELS = 16_000_000
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")

# The controls that shape a frame, in the order of the JavaScript below; `lock` and `live` stay in the browser.
CONTROLS = ("prompt", "style", "strength", "steps", "seed", "guidance", "lock", "live")
TO_PAD = f"""(...values) => {{
  const names = {list(CONTROLS)!r};
  const settings = Object.fromEntries(names.map((name, i) => [name, values[i]]));
  window.sanaSketch = {{ settings }};
  document.dispatchEvent(new Event("sketch:settings"));
  return [];
}}"""
FROM_PAD = f"(given) => {list(CONTROLS)!r}.map((name) => given[name])"
DICE = f"() => Math.floor(Math.random() * {SEED_MAX})"

HEAD = """
<header class="sk-head">
  <h1>Sana Sketch</h1>
  <p>Draw, and a picture follows your pen.</p>
  <p class="sk-model" title="The model that answers"></p>
</header>
"""
HEAD_JS = """element.querySelector(".sk-model").textContent = props.model;"""

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.gradio-container > .main { padding: 22px clamp(16px, 4vw, 44px) 40px !important; }
footer { display: none !important; }
.sk-head { display: flex; align-items: baseline; gap: 4px 16px; flex-wrap: wrap; padding: 2px 2px 6px; }
.sk-head h1 { margin: 0; font-family: Georgia, "Iowan Old Style", "Liberation Serif", serif; font-size: 29px; font-weight: 500;
  letter-spacing: -.01em; color: var(--body-text-color); }
.sk-head p { margin: 0; color: var(--body-text-color-subdued); font-size: 15px; }
.sk-head .sk-model { margin-left: auto; font-size: 13px; padding: 3px 12px; border-radius: 99px; border: 1px solid var(--border-color-primary); }
.gradio-container { width: 100%; min-width: 0; }
.form { background: transparent !important; border: 0 !important; box-shadow: none !important; overflow: visible !important; gap: 12px 26px !important; }
.form > .block, #seed, #style { overflow: visible !important; }
#wish { max-width: calc(2 * min(62vh, 600px) + 28px); margin: 0 auto; width: 100%; }
#tuning { gap: 14px 26px; align-items: start; max-width: calc(2 * min(62vh, 600px) + 28px); margin: 10px auto 0; width: 100%;
  padding-top: 18px; border-top: 1px solid var(--border-color-primary); }
.sk-head { max-width: calc(2 * min(62vh, 600px) + 28px); margin: 0 auto; }
#prompt textarea, #prompt input { font-size: 17px; }
#seed-row { gap: 8px; flex-wrap: nowrap; align-items: end; }
.dark #tuning input[type=range] { --neutral-200: var(--neutral-700); }
#style input { font-size: 15px; min-height: 24px; }
@media (max-width: 800px) {
  .gradio-container > .main { padding: 14px 16px 32px !important; }
  #wish .form { gap: 10px !important; }
  .sk-head .sk-model { margin-left: 0; }
}
#dice { min-width: 44px; max-width: 52px; }
"""

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]


def sketch_theme() -> gr.themes.Base:
    """Warm paper, one accent, system fonts (a page must open with no network)."""
    accent = gr.themes.Color(c50="#fdf4ef", c100="#fae4d8", c200="#f3c5ae", c300="#eaa17f", c400="#e07f56", c500="#cf6238",
                             c600="#b5502b", c700="#934025", c800="#743522", c900="#5d2d1f", c950="#33160d")
    paper = gr.themes.Color(c50="#faf8f4", c100="#f3f0ea", c200="#e7e2d9", c300="#d5cec2", c400="#a89f92", c500="#7d756a",
                            c600="#5f5850", c700="#48433d", c800="#2c2926", c900="#1d1b19", c950="#151412")
    theme = gr.themes.Base(primary_hue=accent, secondary_hue=accent, neutral_hue=paper, font=SANS, font_mono=MONO,
                           radius_size=gr.themes.sizes.radius_lg, spacing_size=gr.themes.sizes.spacing_md)
    return theme.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="transparent", block_background_fill_dark="transparent",
        block_border_width="0px", block_border_width_dark="0px", block_shadow="none", block_shadow_dark="none",
        block_padding="0px", block_label_text_size="13px", block_title_text_size="13px",
        block_title_text_color="*neutral_500", block_title_text_color_dark="*neutral_400", block_title_text_weight="500",
        input_background_fill="white", input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_200", input_border_color_dark="*neutral_800",
        input_radius="14px", input_border_width="1px", checkbox_border_width="1px", input_padding="10px 14px", input_shadow="none", input_shadow_dark="none",
        background_fill_secondary="*neutral_100", background_fill_secondary_dark="*neutral_900",
        border_color_primary="*neutral_200", border_color_primary_dark="*neutral_800",
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        slider_color="*primary_500", slider_color_dark="*primary_400", color_accent="*primary_500",
    )


class SketchBlocks(gr.Blocks):
    """Blocks that bring their own live route, look and limits along, whoever calls `launch()` (app.py, a Space, a notebook)."""

    service: LiveService | None = None
    before_launch = None

    def launch(self, *args, **kwargs):
        if self.before_launch:
            self.before_launch()
        app_kwargs = dict(kwargs.pop("app_kwargs", None) or {})
        app_kwargs["routes"] = [*app_kwargs.get("routes", []), *self.service.routes()]
        app_kwargs["middleware"] = [*app_kwargs.get("middleware", []), Middleware(BodyLimit)]
        # _frontend=False: no start is given up because a busy machine took over 3 s to answer Gradio's call to itself
        defaults = dict(_frontend=False, theme=sketch_theme(), css=CSS, ssr_mode=False, run_history=False, show_error=False,
                        max_file_size="8mb", footer_links=[], pwa=False)
        return super().launch(*args, **{**defaults, **kwargs}, app_kwargs=app_kwargs)

    def close(self, *args, **kwargs):
        self.service.worker.stop()
        return super().close(*args, **kwargs)


def first_settings(example: dict) -> dict:
    return {"prompt": example["prompt"], "style": example["style"], "strength": 1.0, "steps": 1, "seed": example["seed"],
            "guidance": 4.5, "lock": True, "live": True}


def build_page(engine, **pad_options) -> SketchBlocks:
    """The page for one engine: `name`, `size` (px), `styles`, `render(request)`."""
    worker = RenderWorker(engine.render)
    service = LiveService(worker, tuple(engine.styles))
    examples = read_examples()
    for example in examples:  # a model with other styles still opens with the same drawings
        example["style"] = example["style"] if example["style"] in engine.styles else "none"
    start = first_settings(examples[0])
    with SketchBlocks(title="Sana Sketch", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(html_template=HEAD, js_on_load=HEAD_JS, apply_default_css=False, model=f"{engine.name} · {engine.size} px")
        c = wish_row(engine, start)
        pad = sketch_pad(service, examples=examples, settings=start, side=256 if engine.size <= 256 else 512,
                         elem_id="sketch-pad", **pad_options)
        c |= tuning_row(start)
        connect(demo, pad, c)
        add_api(engine, worker, start)
    demo.service = service
    first = first_request(examples[0], start)
    demo.before_launch = lambda: show_first(pad, worker.submit("first page", first).result().jpeg)  # and warms the model
    demo.queue(max_size=32, api_open=False)
    return demo


def wish_row(engine, start: dict) -> dict:
    with gr.Row(elem_id="wish"):
        # no max_length: the browser would cut a paste without a word; the pad sends what is read of it, and says so
        prompt = gr.Textbox(start["prompt"], label="What are you drawing?", lines=1, max_lines=3, scale=4, min_width=200,
                            placeholder="a red apple (empty: the lines alone decide)", elem_id="prompt")
        style = gr.Dropdown(list(engine.styles), value=start["style"], label="Style", scale=1, min_width=116,
                            elem_id="style", filterable=False)
    return {"prompt": prompt, "style": style}


def tuning_row(start: dict) -> dict:
    with gr.Row(elem_id="tuning"):
        strength = gr.Slider(0, STRENGTH_MAX, start["strength"], step=0.05, label="Line strength",
                             elem_id="strength", min_width=200, buttons=[])
        guidance = gr.Slider(1, 10, start["guidance"], step=0.5, label="Word strength",
                             elem_id="guidance", min_width=200, buttons=[])
        steps = gr.Radio([(str(n), n) for n in STEPS], value=start["steps"], label="Steps", elem_id="steps", min_width=140)
        with gr.Column(min_width=240):
            with gr.Row(elem_id="seed-row"):
                seed = gr.Number(start["seed"], label="Seed", precision=0, minimum=0, maximum=SEED_MAX, elem_id="seed", min_width=110)
                dice = gr.Button("⚄", elem_id="dice", min_width=44)
        with gr.Column(min_width=150):
            lock = gr.Checkbox(start["lock"], label="Keep the seed", elem_id="lock", container=False)
            live = gr.Checkbox(start["live"], label="Live while drawing", elem_id="live", container=False)
    dice.click(fn=None, js=DICE, outputs=[seed], api_visibility="private")
    return {"strength": strength, "guidance": guidance, "steps": steps, "seed": seed, "lock": lock, "live": live}


def connect(demo: gr.Blocks, pad: gr.HTML, c: dict) -> None:
    """Controls to pad and back, in the browser only: no request is made and nothing is stored on the server."""
    controls = [c[name] for name in CONTROLS]
    private = dict(fn=None, api_visibility="private")
    gr.on([demo.load, *(control.change for control in controls)], js=TO_PAD, inputs=controls, outputs=[], **private)
    pad.fill(js=FROM_PAD, inputs=[pad], outputs=controls, **private)


def first_request(example: dict, start: dict) -> RenderRequest:
    """The first example as the pad would send it (near enough: Pillow's line in place of the browser's)."""
    page = Image.new("L", (512, 512))
    for stroke in example["strokes"]:
        ImageDraw.Draw(page).line([tuple(p) for p in stroke["points"]], 255, stroke["size"], "curve")
    ink = np.asarray(page.resize((256, 256), Image.Resampling.BOX))
    return RenderRequest(ink=ink, **{k: start[k] for k in ("prompt", "style", "strength", "steps", "seed", "guidance")})


def add_api(engine, worker: RenderWorker, start: dict) -> None:
    """`generate`, the one endpoint for programs: sketch file and settings -> picture and what was done.

    Its fields are hidden and unbounded, so that every refusal is check_request's, in its words.
    """

    def generate(sketch, prompt, style, strength, steps, seed, guidance):
        try:
            request = check_request(read_sketch(sketch), prompt=prompt, style=style, strength=strength, steps=steps,
                                    seed=seed, guidance=guidance, styles=tuple(engine.styles))
            future = worker.submit(tab := f"api {uuid4()}", request)
            done = future.result(timeout=JOB_LIMIT_S)
        except (ValueError, Busy) as error:
            raise gr.Error(str(error), print_exception=False) from None
        except TimeoutError:
            worker.withdraw(tab, future)
            raise gr.Error(NO_PICTURE, print_exception=False) from None
        info = {"seed": request.seed, "steps": request.steps, "model": engine.name, "notices": list(done.notices),
                "stages_ms": {name: round(ms, 2) for name, ms in done.stages_ms.items()}}
        return done.pixels, info

    with gr.Group(visible=False):
        sketch = gr.Image(label="sketch", type="filepath", sources=["upload"])
        sketch.preprocess = lambda payload: payload.path if payload else None  # read_sketch opens it, under its own bounds
        words = [gr.Textbox(start[name], label=name) for name in ("prompt", "style")]
        numbers = [gr.Number(start[name], label=name) for name in ("strength", "steps", "seed", "guidance")]
        picture, info, run = gr.Image(label="picture", format="png"), gr.JSON(label="info"), gr.Button("generate")
    run.click(generate, [sketch, *words, *numbers], [picture, info], api_name="generate", concurrency_limit=4,
              show_progress="hidden")


def read_sketch(path: str | None) -> np.ndarray | None:
    """A picture file of a drawing -> ink [H, W] uint8; None stays None. Only PNG, JPEG and WebP are opened."""
    if path is None:
        return None
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"sketch: at most 16 million pixels are wanted, got {image.width} x {image.height}; scale it down")
            return ink_from_rgb(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("sketch: at most 16 million pixels are wanted, got a picture of more; scale it down") from None
    except (OSError, SyntaxError):
        came = f"{os.path.getsize(path)} bytes that are none or are damaged" if os.path.isfile(path) else "no file"
        raise ValueError(f"sketch: a PNG, JPEG or WebP picture is wanted, got {came}; save the drawing as PNG and send that") from None
