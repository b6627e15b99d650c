"""A model folder as something that makes pictures: SANA-Sprint in 1, 2 or 4 steps, with or without lines, or a flow teacher in N."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline

from sana_app.model.folder import check_finite, check_folder, read_json
from sana_app.model.pipeline import SanaSprintControlNetPipeline
from sana_app.model.text import TextSettings
from sana_app.presets import find_model
from training.data.cache import digest
from training.evaluate import BATCH, generate, to_tensor, to_uint8

FLOW_GUIDANCE = 4.5  # of a flow teacher, the published default; a Sprint model is fed the same number as its default
THROUGHPUT_BATCH = 10  # the batch of the paper's throughput figures


@dataclass
class Model:
    """A loaded folder. `flow`: it is a SanaPipeline folder (a teacher); else a Sprint folder, maybe with a ControlNet."""

    source: str  # folder or hub id
    pipe: SanaSprintControlNetPipeline | SanaPipeline
    settings: TextSettings
    flow: bool

    @property
    def name(self) -> str:
        return Path(self.source).name

    @property
    def size_px(self) -> int:
        return self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    @property
    def follows_lines(self) -> bool:
        return not self.flow and self.pipe.controlnet is not None

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (20,) if self.flow else (1, 2, 4)

    def make(self, prompts: list[str], seeds: list[int], steps: int, inks: np.ndarray | None = None) -> np.ndarray:
        """Pictures uint8 [N, S, S, 3]. Each has its own seed; `inks` uint8 [N, H, W] are followed, None = from the words alone."""
        if not self.flow:
            return generate(self.pipe, inks, prompts, seeds, steps, 0.0 if inks is None else 1.0)
        if inks is not None:
            raise ValueError(f"{self.name} is a flow teacher without a ControlNet: it follows no lines")
        made, instruction = [], self.settings.instruction
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            out = self.pipe(prompts[part], num_inference_steps=steps, guidance_scale=FLOW_GUIDANCE, height=self.size_px, width=self.size_px,
                            generator=[torch.Generator().manual_seed(s) for s in seeds[part]], output_type="pt", use_resolution_binning=False,
                            max_sequence_length=self.settings.max_tokens, complex_human_instruction=[instruction] if instruction else None)
            made.append(to_uint8(out.images.float() * 2 - 1))
        return np.concatenate(made)

    @torch.no_grad()
    def through_vae(self, images: np.ndarray) -> np.ndarray:
        """Real pictures there and back through the model's autoencoder: what no denoiser can do better. uint8 [N, S, S, 3] twice."""
        vae, made = self.pipe.vae, []
        for block in to_tensor(images).split(BATCH):
            latents = vae.encode(block.to(vae.device, vae.dtype), return_dict=False)[0]
            made.append(to_uint8(vae.decode(latents, return_dict=False)[0].float()))
        return np.concatenate(made)


def load_model(name: str, precision: str = "fp32") -> Model:
    """A model folder, a preset of the page or a hub id, on the GPU where there is one. ValueError names what is wrong with a folder."""
    source, dtype = find_model(name).source, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    index = Path(source) / "model_index.json"
    flow = index.is_file() and read_json(index).get("_class_name") == "SanaPipeline"
    if flow:
        check_folder(source)
        pipe = SanaPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
        check_finite({part: module for part, module in pipe.components.items() if isinstance(module, torch.nn.Module)})
        settings = TextSettings.of_folder(source, pipe.text_encoder)
    else:
        pipe = SanaSprintControlNetPipeline.from_pretrained(source, torch_dtype=dtype)
        settings = pipe.text_settings
    pipe.set_progress_bar_config(disable=True)
    return Model(source, pipe.to("cuda" if torch.cuda.is_available() else "cpu"), settings, flow)


def picture_seed(seed: int, *names: object) -> int:
    """The noise seed of one picture: a function of the run's seed and the picture's name, so that any part can be made again alone."""
    return int(digest(str(seed), *map(str, names)), 16) % 2**63


def check_steps(model: Model, steps: tuple[int, ...]) -> None:
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise ValueError(f"--steps {','.join(map(str, steps))}: wanted different whole numbers from 1, for example 1,2,4")
    if not model.flow and not set(steps) <= {1, 2, 4}:
        raise ValueError(f"--steps {','.join(map(str, steps))}: {model.name} is a Sprint model, its published times are those of 1, 2 and 4 steps")


def speed(model: Model, prompts: list[str], inks: np.ndarray | None, steps: int, runs: int) -> dict[str, float]:
    """Median of `runs`, warm, prompt encoding, decoding and the copy to the host included: latency of one picture in ms, and
    pictures a second in batches of 10."""
    def timed(count: int) -> float:
        rows = [i % len(prompts) for i in range(count)]
        begun = time.perf_counter()
        model.make([prompts[i] for i in rows], list(range(count)), steps, None if inks is None else inks[rows])
        return time.perf_counter() - begun

    def median(count: int, repeats: int) -> float:
        timed(count)  # to warm up
        return float(np.median([timed(count) for _ in range(repeats)]))
    return {"latency_ms": 1e3 * median(1, runs), "images_per_s": THROUGHPUT_BATCH / median(THROUGHPUT_BATCH, max(1, runs // 4))}
