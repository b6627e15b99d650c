"""SanaSprintControlNetPipeline: sketch + prompt -> picture in 1, 2 or 4 steps.

Latents outside denoise() always have unit variance (VAE latent * scaling_factor), as `latents` and
output_type="latent" of the stock pipeline do; sigma_data is multiplied in and divided out inside denoise().
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import Tensor

from sana_app.model import trigflow
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.folder import (
    SAMPLING_FILE,
    check_finite,
    check_folder,
    move_into_place,
    read_json,
    read_noise_scale,
    write_json,
)
from sana_app.model.inputs import (
    check_options,
    check_parts_fit,
    check_prompt,
    check_size,
    control_tensor,
    expand_batch,
    is_hub_id,
)
from sana_app.model.network import predict_F
from sana_app.model.text import TextSettings, cut_off, encode_text


class SanaSprintControlNetPipeline(SanaSprintPipeline):
    """The stock SanaSprintPipeline with an optional ControlNet, steps one can call one by one, and checked folders.

    Loads the published layout, and folders with controlnet/ beside it; a folder written by save_pretrained loads in
    the stock pipeline. LoRA adapters load through SanaLoraLoaderMixin (load_lora_weights, unload_lora_weights).

    noise_scale (sampling.json in the folder, else 1): std of the noise that is drawn here, below 1 for cleaner and less
    varied pictures (the truncation trick of BigGAN, arXiv 1809.11096). `latents` that are passed in stay as they are.
    """

    model_cpu_offload_seq = "text_encoder->controlnet->transformer->vae"
    _optional_components = ["controlnet"]

    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae: AutoencoderDC,
        transformer: SanaTransformer2DModel,
        scheduler,
        controlnet: SanaSprintControlNetModel | None = None,
    ):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=controlnet)
        self.text_settings = TextSettings.fitting(text_encoder)
        self.noise_scale = 1.0
        check_parts_fit(vae, text_encoder, transformer, controlnet)

    # ---- folders ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "SanaSprintControlNetPipeline":
        """Load a folder (or a hub id) in torch_dtype, float32 by default; ready-made components may be passed.

        Raises ValueError for a missing, half-written or damaged folder, tensors that do not fit, NaN weights.
        """
        folder = os.fspath(pretrained_model_name_or_path)
        dtype = kwargs.pop("torch_dtype", None) or torch.float32  # dtype is diffusers' new name for torch_dtype
        dtype = kwargs.setdefault("dtype", dtype)
        kwargs.setdefault("use_safetensors", True)
        if os.path.isdir(folder) or not is_hub_id(folder):
            check_folder(folder, kwargs.get("variant"), skip=tuple(kwargs))
            if "controlnet" not in kwargs and os.path.isdir(os.path.join(folder, "controlnet")):
                if isinstance(dtype, dict):
                    dtype = dtype.get("controlnet", dtype.get("default", torch.float32))
                kwargs["controlnet"] = SanaSprintControlNetModel.from_pretrained(
                    folder, subfolder="controlnet", dtype=dtype, use_safetensors=True
                )
        try:
            pipe = super().from_pretrained(folder, **kwargs)
        except (OSError, HfHubHTTPError) as error:
            raise ValueError(f"{folder} is neither a model folder nor a model that can be fetched: {error}") from error
        if "sigma_data" not in pipe.scheduler.config:
            raise ValueError(
                f"{folder} has the scheduler {type(pipe.scheduler).__name__}: it is a flow model (base SANA, a teacher, a fine-tuned one), "
                "and one step takes a SANA-Sprint model. Distil it first (python -m training student), or draw with the stock SanaPipeline"
            )
        pipe.text_settings = TextSettings.of_folder(folder, pipe.text_encoder)
        pipe.noise_scale = read_noise_scale(folder)
        check_finite({name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)})
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write a folder that the stock SanaSprintPipeline loads without our code; controlnet/ lies beside its parts.

        The folder appears whole or not at all (it is written as NAME.incomplete first).
        """
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("a LoRA adapter is loaded: unload_lora_weights() before saving the model")
        folder = Path(save_directory)
        new = folder.with_name(folder.name + ".incomplete")
        shutil.rmtree(new, ignore_errors=True)  # left by an interrupted save
        folder.parent.mkdir(parents=True, exist_ok=True)
        super().save_pretrained(new, **kwargs)
        index = read_json(new / "model_index.json")
        index.pop("controlnet", None)
        write_json(new / "model_index.json", index | {"_class_name": SanaSprintPipeline.__name__})
        self.text_settings.save(new)
        if self.noise_scale != 1:
            write_json(new / SAMPLING_FILE, {"noise_scale": self.noise_scale})
        move_into_place(new, folder)

    # ---- the steps, each timed by itself by the live engine -----------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prompt(s) -> token states [B, L, C] and mask [B, L]; see text.py. cut_off() says what did not fit."""
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds, prompt_attention_mask, _ = encode_text(
                self.tokenizer, self.text_encoder, prompts, self.text_settings
            )
        n = num_images_per_prompt
        return prompt_embeds.repeat_interleave(n, dim=0), prompt_attention_mask.repeat_interleave(n, dim=0)

    def cut_off(self, prompt: str) -> str:
        """The end of the prompt that is too long for the model, "" if it fits."""
        return cut_off(self.tokenizer, [prompt], self.text_settings)[0]

    @torch.no_grad()
    def encode_condition(
        self, control_image: Tensor | np.ndarray | Image.Image, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Line image -> latent [B, C, h, w] = vae.encode(image) * scaling_factor, unit variance.

        This is what the ControlNet and denoise() are fed with: maths-notation `cond` divided by sigma_data, as x_t is.
        The image is a tensor [B, 3, H, W] in [-1, 1] with white lines on black, or a PIL image or uint8 array of a
        drawing in any polarity, and has the size of the picture (default: the model's own).
        """
        height, width = height or self.default_size, width or self.default_size
        image = control_tensor(control_image, height, width).to(self.vae.device, self.vae.dtype)
        return self.vae.encode(image, return_dict=False)[0] * self.vae.config.scaling_factor

    def noise(self, height: int, width: int, generator=None, batch_size: int = 1) -> Tensor:
        """Normal latents [B, C, h, w] of std noise_scale, float32."""
        return self.noise_scale * self.prepare_latents(
            batch_size, self.transformer.config.in_channels, height, width, torch.float32,
            self._execution_device, generator,
        )  # fmt: skip

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        cond: Tensor | None = None,
        conditioning_scale: float | Tensor = 1.0,
        guidance_scale: float = 4.5,
        timesteps: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise_scale: float = 1.0,
    ) -> Tensor:
        """Noise [B, C, h, w] -> clean latents [B, C, h, w], both of unit variance, float32.

        timesteps: falling angles from noise to 0, one more than there are steps (trigflow.sprint_timesteps; default:
        one step). generator: of the noise that SCMScheduler adds between steps; noise_scale: its std, that of the first noise where
        noise() drew it. cond: from encode_condition, or None.
        """
        timesteps = timesteps or trigflow.sprint_timesteps(1)
        sigma_data = self.scheduler.config.sigma_data
        self.scheduler.set_timesteps(
            len(timesteps) - 1, timesteps=timesteps, device=latents.device,
            max_timesteps=None, intermediate_timesteps=None,
        )  # fmt: skip
        self.scheduler.set_begin_index(0)
        x_t = latents.float() * sigma_data
        for t in self.scheduler.timesteps[:-1]:
            F = predict_F(
                self.transformer, x_t / sigma_data, t.expand(len(x_t)), prompt_embeds, prompt_attention_mask,
                guidance_scale, self.controlnet, cond, conditioning_scale,
            )  # fmt: skip
            x_t, x0 = self.scheduler.step(sigma_data * F, t, x_t, generator=generator, return_dict=False)
            if noise_scale != 1 and isinstance(self.scheduler, SCMScheduler) and len(timesteps) > 2:
                kept = torch.cos(self.scheduler.timesteps[self.scheduler.step_index]) * x0
                x_t = kept + noise_scale * (x_t - kept)
        return x0 / sigma_data

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents of unit variance [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1]."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0].clamp(-1, 1)

    # ---- all of it ----------------------------------------------------------------------------------------------

    @property
    def default_size(self) -> int:
        """Side in pixels of the picture the model was trained for."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        control_image: Tensor | np.ndarray | Image.Image | None = None,
        controlnet_conditioning_scale: float = 1.0,
        num_inference_steps: int = 1,
        timesteps: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> SanaPipelineOutput | tuple:
        """Generate. Steps 1, 2 and 4 use the paper's times; any others need `timesteps`, falling angles to 0.

        latents: standard normal noise [B, C, h, w]. output_type: "pil", "np", "pt" ([B, 3, H, W] in [0, 1]), "latent".
        Bad input is refused as ValueError before anything is computed.
        """
        height, width = height or self.default_size, width or self.default_size
        check_size(height, width, self.vae_scale_factor * self.transformer.config.patch_size)
        check_prompt(prompt, prompt_embeds, prompt_attention_mask, self.transformer.config.caption_channels)
        check_options(seed, generator, output_type, controlnet_conditioning_scale, guidance_scale)
        if timesteps is None:
            timesteps = trigflow.sprint_timesteps(num_inference_steps)
        if control_image is not None:
            if self.controlnet is None:
                raise ValueError("a control image was given, but this model has no controlnet: leave it out")
            control_image = control_tensor(control_image, height, width)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)

        embeds, mask = self.encode_prompt(prompt, num_images_per_prompt, prompt_embeds, prompt_attention_mask)
        cond = None
        if control_image is not None and controlnet_conditioning_scale != 0:
            cond = self.encode_condition(control_image, height, width)
            cond = expand_batch(cond, len(embeds))
        noise_scale = 1.0  # who hands over latents gets the stock pipeline's pictures, at any number of steps
        if latents is None:
            noise_scale = self.noise_scale
            latents = self.noise(height, width, generator, len(embeds))
        channels, f = self.transformer.config.in_channels, self.vae_scale_factor
        wanted = [len(embeds), channels, height // f, width // f]
        if list(latents.shape) != wanted:
            raise ValueError(f"latents are {list(latents.shape)}, wanted {wanted} for {width}x{height} pixels")
        x0 = self.denoise(
            latents.to(self._execution_device), embeds, mask, cond, controlnet_conditioning_scale, guidance_scale,
            timesteps, generator, noise_scale,
        )  # fmt: skip
        images = x0
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode(x0), output_type=output_type)
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=images) if return_dict else (images,)
