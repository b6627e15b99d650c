"""The one place where a SANA network (teacher or Sprint, with or without ControlNet) is called in TrigFlow form."""

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from sana_app.model import trigflow
from sana_app.model.controlnet import SanaSprintControlNetModel


def network_time(s: Tensor, config) -> Tensor:
    """What the sinusoidal time embedding is fed for a flow time s in [0, 1].

    Sprint models (guidance_embeds): s, as in the stock SanaSprintPipeline. Base SANA and teachers: s * 1000 *
    timestep_scale, as in the stock SanaPipeline, which is s * 1000 for base SANA (1.0) and s for teachers (0.001).
    """
    return s if config.guidance_embeds else s * (1000 * config.timestep_scale)


def predict_flow(
    transformer: SanaTransformer2DModel,
    x_s: Tensor,
    s: Tensor,
    prompt_embeds: Tensor,
    prompt_attention_mask: Tensor | None = None,
    guidance: Tensor | float | None = None,
    controlnet: SanaSprintControlNetModel | None = None,
    cond: Tensor | None = None,
    conditioning_scale: Tensor | float = 1.0,
) -> Tensor:
    """Flow velocity v(x_s, s) [B, C, h, w], the network's native output; x_s has unit variance, s is [B] in [0, 1].

    guidance: the scale itself, for example 4.5 (number or [B]); guidance_embeds_scale is applied here. It is ignored
    by a teacher, which has no guidance embedding. cond: the lines' latent as encode_condition returns it, or None.
    """
    config, dtype = transformer.config, transformer.dtype
    inputs = dict(
        hidden_states=x_s.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        encoder_attention_mask=prompt_attention_mask,
        timestep=network_time(s, config),
        return_dict=False,
    )
    if config.guidance_embeds:
        if guidance is None:
            raise ValueError("this model embeds the guidance scale: pass guidance, for example 4.5")
        guidance = torch.as_tensor(guidance, dtype=dtype, device=x_s.device).expand(x_s.shape[0])
        inputs["guidance"] = guidance * config.guidance_embeds_scale
    residuals = None
    if controlnet is not None and cond is not None:
        residuals = controlnet(controlnet_cond=cond.to(dtype), conditioning_scale=conditioning_scale, **inputs)[0]
    return transformer(controlnet_block_samples=residuals, **inputs)[0]


def predict_F(transformer: SanaTransformer2DModel, x: Tensor, t: Tensor, *args, **kwargs) -> Tensor:
    """TrigFlow output F(x, t), float32 [B, C, h, w], for x = x_t / sigma_data and angles t [B] (SANA-Sprint eq. 6-8).

    Further arguments as in predict_flow. Differentiable in x and t in both modes (for the JVP put the explicit
    softmax of attention.py on the models first).
    """
    s = trigflow.flow_time(t)
    x_s = trigflow.flow_input(x, t, sigma_data=1.0)
    return trigflow.flow_output_to_F(predict_flow(transformer, x_s, s, *args, **kwargs).float(), x_s, s)


class TrigFlowTeacher(nn.Module):
    """A flow-matching teacher, with an optional ControlNet, as a TrigFlow network F(x_t / sigma_data, t, ...)."""

    def __init__(self, transformer: SanaTransformer2DModel, controlnet: SanaSprintControlNetModel | None = None):
        super().__init__()
        self.transformer = transformer
        self.controlnet = controlnet

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor | None = None,
        cond: Tensor | None = None,
        conditioning_scale: Tensor | float = 1.0,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """x [B, C, h, w] = x_t / sigma_data, t [B] in radians -> F [B, C, h, w]; the other arguments as predict_flow."""
        return predict_F(
            self.transformer, x, t, prompt_embeds, prompt_attention_mask, guidance,
            self.controlnet, cond, conditioning_scale,
        )  # fmt: skip
