"""ControlNet of SANA-Sprint: a trainable copy of the first k blocks of the transformer that also sees the lines.

Differences to the stock SanaControlNetModel, each needed by a one-step model: RMS norm on q and k, the guidance
embedding, the timestep scale; all three come from the transformer's config. It also copies a teacher (no guidance).
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle, RMSNorm
from diffusers.models.transformers.sana_transformer import (
    SanaCombinedTimestepGuidanceEmbeddings,
    SanaTransformer2DModel,
    SanaTransformerBlock,
)
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import Tensor, nn


@dataclass
class SanaSprintControlNetOutput(BaseOutput):
    """controlnet_block_samples: k residuals [B, N, D] for SanaTransformer2DModel.forward."""

    controlnet_block_samples: tuple[Tensor, ...]


def zero_linear(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def like(model: ModelMixin, other: ModelMixin) -> ModelMixin:
    """model on the device and in the dtype of the other (ModelMixin.to warns about a dtype even if it is the same)."""
    model = model.to(other.device)
    return model if model.dtype == other.dtype else model.to(other.dtype)


class SanaSprintControlNetModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Config keys are those of SanaTransformer2DModel; num_layers is the number k of copied blocks."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SanaTransformerBlock", "PatchEmbed"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 7,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 32,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        guidance_embeds: bool = True,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = "rms_norm_across_heads",
        timestep_scale: float = 0.001,
    ) -> None:
        super().__init__()
        inner_dim = num_attention_heads * attention_head_dim
        self.patch_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=inner_dim,
            interpolation_scale=interpolation_scale,
            pos_embed_type="sincos" if interpolation_scale is not None else None,
        )
        self.time_embed = (
            SanaCombinedTimestepGuidanceEmbeddings(inner_dim) if guidance_embeds else AdaLayerNormSingle(inner_dim)
        )
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=inner_dim)
        self.caption_norm = RMSNorm(inner_dim, eps=1e-5, elementwise_affine=True)
        self.transformer_blocks = nn.ModuleList(
            SanaTransformerBlock(
                inner_dim,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                num_cross_attention_heads=num_cross_attention_heads,
                cross_attention_head_dim=cross_attention_head_dim,
                cross_attention_dim=cross_attention_dim,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
            )
            for _ in range(num_layers)
        )
        self.input_block = zero_linear(inner_dim)
        self.controlnet_blocks = nn.ModuleList(zero_linear(inner_dim) for _ in range(num_layers))
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(
        cls, transformer: SanaTransformer2DModel, num_layers: int = 7, load_weights_from_transformer: bool = True
    ) -> "SanaSprintControlNetModel":
        """Copy of the embeddings and the first num_layers blocks; the zero layers make it change nothing at first.

        Works on a Sprint model and on a teacher without guidance embedding; dtype and device follow the transformer.
        """
        most = transformer.config.num_layers - 1  # residual i enters after base block i >= 1
        if not 1 <= num_layers <= most:
            raise ValueError(
                f"num_layers={num_layers}: a transformer of {most + 1} blocks takes 1 to {most} ControlNet blocks"
            )
        keys = cls._get_init_keys(cls) - {"self"}
        config = {k: v for k, v in transformer.config.items() if k in keys} | {"num_layers": num_layers}
        controlnet = like(cls.from_config(config), transformer)
        if load_weights_from_transformer:
            source, target = transformer.state_dict(), controlnet.state_dict()
            result = controlnet.load_state_dict({k: v for k, v in source.items() if k in target}, strict=False)
            added = [k for k in result.missing_keys if not k.startswith(("input_block.", "controlnet_blocks."))]
            assert not added, f"the transformer has no weights for {added}"
        return controlnet

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SanaSprintControlNetOutput | tuple[tuple[Tensor, ...]]:
        """k residuals; residual i is added after base block i, i = 1..k (the stock transformer's rule).

        NVlabs' code adds each one block earlier: its ControlNet weights are not numerically portable to this rule.

        Args (all in the conventions of SanaTransformer2DModel.forward, which gets the same values):
            hidden_states [B, C, h, w]: x_s, the flow input (see trigflow.flow_input), unit variance.
            encoder_hidden_states [B, L, caption_channels], encoder_attention_mask [B, L] (1 = keep) or bias [B, 1, L].
            timestep [B]: what the time embedding sees, s in [0, 1] for Sprint models (see network.network_time).
            controlnet_cond [B, C, h, w]: the lines' VAE latent, unit variance (scaling_factor applied, sigma_data not).
            conditioning_scale: number or [B], multiplies the residuals.
            guidance [B]: guidance scale * guidance_embeds_scale; required with guidance_embeds, refused without.
        """
        if (guidance is not None) != self.config.guidance_embeds:
            raise ValueError(
                f"guidance was {'given' if guidance is not None else 'missing'}, but this ControlNet has "
                f"guidance_embeds={self.config.guidance_embeds}"
            )
        if controlnet_cond.shape[1:] != hidden_states.shape[1:]:
            raise ValueError(
                f"controlnet_cond is {list(controlnet_cond.shape)}, wanted {list(hidden_states.shape)} like the latents"
            )
        # a 0/1 mask becomes a bias with the stock model's -10000 for padding
        attention_mask = mask_to_bias(attention_mask, hidden_states.dtype)                    # [B, 1, N]
        encoder_attention_mask = mask_to_bias(encoder_attention_mask, hidden_states.dtype)    # [B, 1, L]
        batch = hidden_states.shape[0]
        height, width = (n // self.config.patch_size for n in hidden_states.shape[-2:])

        hidden_states = self.patch_embed(hidden_states)                                       # [B, N, D]
        hidden_states = hidden_states + self.input_block(self.patch_embed(controlnet_cond.to(hidden_states.dtype)))
        if guidance is not None:
            temb, _ = self.time_embed(timestep, guidance=guidance, hidden_dtype=hidden_states.dtype)
        else:
            temb, _ = self.time_embed(timestep, batch_size=batch, hidden_dtype=hidden_states.dtype)  # [B, 6D]
        text = self.caption_norm(self.caption_projection(encoder_hidden_states))              # [B, L, D]

        residuals = []
        for block, zero_block in zip(self.transformer_blocks, self.controlnet_blocks):
            args = (hidden_states, attention_mask, text, encoder_attention_mask, temb, height, width)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *args)
            else:
                hidden_states = block(*args)
            residuals.append(zero_block(hidden_states))
        if torch.is_tensor(conditioning_scale):
            conditioning_scale = conditioning_scale.to(hidden_states.dtype).reshape(-1, 1, 1)
        residuals = tuple(r * conditioning_scale for r in residuals)

        if not return_dict:
            return (residuals,)
        return SanaSprintControlNetOutput(controlnet_block_samples=residuals)


def mask_to_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, L], 1 = keep, 0 = drop -> additive [B, 1, L], 0 or -10000, as in SanaTransformer2DModel; a bias passes."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
