"""One loaded model, and what it need not compute twice.

    prompt --LRU--> token states --+
    seed ----LRU--> noise ---------+--> denoise (ControlNet + transformer) --> decode --> JPEG
    ink --> lines --LRU--> condition latent --+

A cached prompt, seed or sketch costs nothing; an unchanged frame is the very same bytes. The keys are contents, never
people, and one thread (sana_app/worker.py) calls `render`.
"""

from __future__ import annotations

import hashlib
import io
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from sana_app.lines import condition_from_ink
from sana_app.model import trigflow
from sana_app.model.adapter import Adapter, load_adapter, parse_adapter
from sana_app.model.fast import use_token_convolutions
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.text import LRU, EncodedText, encode_text
from sana_app.presets import Preset, styled
from sana_app.request import RenderRequest

STAGES = ("prompt", "lines", "condition", "controlnet", "transformer", "decode", "jpeg")  # in the order they run
JPEG_QUALITY = 92


@dataclass(frozen=True, eq=False)
class Rendered:
    """One finished picture: pixels uint8 [H, W, 3] and as JPEG, ms by stage, and what the page should say about it.

    `cached`: nothing was computed for it, and its times are those of a look-up; nobody may take them for the model's.
    """

    pixels: np.ndarray
    jpeg: bytes
    stages_ms: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    cached: bool = False


class Clock:
    """Milliseconds by stage; waits for the device at both ends, so that a stage is charged with its own work."""

    def __init__(self, device: torch.device):
        self.device, self.ms = device, {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        self.ms[stage] = self.ms.get(stage, 0.0) + 1000 * seconds

    @contextmanager
    def __call__(self, stage: str):
        begun = self.now()
        yield
        self.add(stage, self.now() - begun)


class Engine:
    """`name` and `size` (px) are shown on the page; `styles`: style name -> words appended to the caption."""

    def __init__(self, pipe: SanaSprintControlNetPipeline, name: str, styles: dict[str, str]):
        self.pipe, self.name, self.styles, self.size = pipe, name, styles, pipe.default_size
        self.adapter: Adapter | None = None
        self.prompts, self.noises, self.conditions, self.frames = LRU(64), LRU(64), LRU(8), LRU(16)
        self.clock = Clock(pipe.device)
        for stage in ("controlnet", "transformer"):
            if (module := getattr(pipe, stage)) is not None:
                self._time(module, stage)

    @classmethod
    def load(cls, preset: Preset, precision: str = "auto", lora: str = "") -> Engine:
        """Read the model's weights; a missing, half-written or damaged folder is a ValueError that names the file.

        precision: "fp32", "bf16", or "auto" = bf16 where the device multiplies it natively. The text encoder stays in
        fp32 on the CPU: it runs when the prompt changes, not with every frame. lora: PATH[:SCALE] of an adapter.
        """
        cuda = torch.cuda.is_available()
        if Path(preset.source).is_dir():  # nothing to download, nothing to watch
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        dtype = torch.bfloat16 if precision == "bf16" or precision == "auto" and native_bf16() else torch.float32
        pipe = SanaSprintControlNetPipeline.from_pretrained(
            preset.source, torch_dtype={"default": dtype, "text_encoder": dtype if cuda else torch.float32})
        pipe.to("cuda" if cuda else "cpu")
        for part in (pipe.transformer, pipe.controlnet):
            if part is not None:
                use_token_convolutions(part)
        engine = cls(pipe, preset.name, preset.styles)
        if lora:
            engine.load_adapter(lora)
        return engine

    def load_adapter(self, wanted: str) -> Adapter:
        """PATH[:SCALE]: the pictures change, so those made before are forgotten. ValueError: nothing has changed."""
        self.adapter = load_adapter(self.pipe, *parse_adapter(wanted))
        self.name = f"{self.name} + {self.adapter.label}"
        self.frames.clear()
        return self.adapter

    def unload_adapter(self) -> None:
        """Back to the model's own pictures, to the last bit."""
        if self.adapter is not None:
            self.pipe.unload_lora_weights()
            self.name = self.name.removesuffix(f" + {self.adapter.label}")
            self.adapter = None
            self.frames.clear()

    def _time(self, module: torch.nn.Module, stage: str) -> None:
        begun = []
        module.register_forward_pre_hook(lambda *_: begun.append(self.clock.now()))
        module.register_forward_hook(lambda *_: self.clock.add(stage, self.clock.now() - begun.pop()))

    @torch.inference_mode()
    def render(self, request: RenderRequest) -> Rendered:
        """The picture of one request: the same request gives the same bytes, whatever was rendered before."""
        self.clock, begun = Clock(self.pipe.device), time.perf_counter()
        lines = request.ink if self.pipe.controlnet is not None and request.strength > 0 else None
        digest = None if lines is None else (lines.shape, hashlib.blake2b(lines.tobytes()).digest())
        key = (digest, request.prompt, request.style, request.strength, request.steps, request.seed, request.guidance)
        cached = key in self.frames.items
        made = self.frames.get(key, lambda: self._make(request, lines, digest))
        notices = request.notices + made.notices
        if request.ink is not None and self.pipe.controlnet is None:
            notices += ("This model has no ControlNet: it draws from the words alone.",)
        stages_ms = {stage: self.clock.ms.get(stage, 0.0) for stage in STAGES}
        return Rendered(made.pixels, made.jpeg, stages_ms | {"total": 1000 * (time.perf_counter() - begun)}, notices, cached)

    def _make(self, request: RenderRequest, lines: np.ndarray | None, digest) -> Rendered:
        pipe, clock = self.pipe, self.clock
        with clock("prompt"):
            caption = styled(request.prompt, self.styles[request.style])
            text: EncodedText = self.prompts.get(caption, lambda: encode_text(
                pipe.tokenizer, pipe.text_encoder, [caption], pipe.text_settings))
        cond = None if lines is None else self.conditions.get(digest, lambda: self._condition(lines))
        latents, state = self.noises.get(request.seed, lambda: self._noise(request.seed))
        x0 = pipe.denoise(latents, text.embeds, text.mask, cond, request.strength, request.guidance,
                          trigflow.sprint_timesteps(request.steps), generator_at(state), pipe.noise_scale)     # [1, C, h, w]
        with clock("decode"):
            image = pipe.decode(x0)                                                          # [1, 3, H, W]
        with clock("jpeg"):
            pixels = (image[0].float() * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            jpeg = encode_jpeg(pixels)
        return Rendered(pixels, jpeg, notices=cut_notice(text.cut[0]))

    def _condition(self, lines: np.ndarray) -> torch.Tensor:
        with self.clock("lines"):
            image = condition_from_ink(lines, self.size)                                     # [1, 3, S, S]
        with self.clock("condition"):
            return self.pipe.encode_condition(image)                                         # [1, C, h, w]

    def _noise(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First noise of a seed, and the generator's state after it (2 and 4 steps draw on from there)."""
        generator = torch.Generator().manual_seed(seed)
        return self.pipe.noise(self.size, self.size, generator), generator.get_state()


def native_bf16() -> bool:
    """Measured on avx512_bf16, 128 px model: 44 ms a frame in bf16 weights, 50 under autocast, 63 in fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def generator_at(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def cut_notice(rest: str) -> tuple[str, ...]:
    """What the page says about words past the model's token limit."""
    if not rest:
        return ()
    rest = rest if len(rest) <= 60 else rest[:57] + "…"
    return (f"The prompt is too long for this model; not read: “{rest}”",)


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> JPEG, full colour resolution (a thin red line must stay red)."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()
