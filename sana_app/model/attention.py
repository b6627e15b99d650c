"""Cross attention with an explicit float32 softmax, for forward-mode AD (the JVP of the sCM loss).

torch.func.jvp does not go through the flash / efficient attention kernels; this does the same sum in plain
operations. The self attention of SANA is linear and needs nothing.
"""

import math

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn


class ExplicitSoftmaxAttnProcessor:
    """softmax(q k^T / sqrt(d) + bias) v in float32, otherwise SanaAttnProcessor2_0 line by line."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, N, C], encoder_hidden_states [B, L, C'], attention_mask an additive bias [B, 1, L]."""
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        query = attn.to_q(hidden_states)
        key = attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        out_dtype = query.dtype

        # autocast would send the float32 matmuls back to half precision
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (
                x.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
            )                                                                              # [B, heads, N or L, d]
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])            # [B, heads, N, L]
            if attention_mask is not None:
                scores = scores + attention_mask.unsqueeze(1).float()                      # + [B, 1, 1, L]
            out = scores.softmax(dim=-1) @ value                                           # [B, heads, N, d]
        out = out.transpose(1, 2).flatten(2).to(out_dtype)                                 # [B, N, C]

        out = attn.to_out[1](attn.to_out[0](out))
        return out / attn.rescale_output_factor


def use_explicit_softmax(model: nn.Module, enabled: bool = True) -> int:
    """Put the explicit processor on every cross attention of a SANA model (or the stock one back); returns how many."""
    stock, explicit = SanaAttnProcessor2_0, ExplicitSoftmaxAttnProcessor
    old, new = (stock, explicit) if enabled else (explicit, stock)
    changed = [m for m in model.modules() if isinstance(m, Attention) and isinstance(m.processor, old)]
    for module in changed:
        module.set_processor(new())
    return len(changed)
