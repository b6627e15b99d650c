"""The LADD discriminator: a frozen teacher in TrigFlow form and one small head on the output of a few of its blocks.

The head follows StyleGAN-T: spectral-norm convolutions over the token sequence, a residual one of width 9, batch norm
over small groups ("local"), one logit a token.
"""

from __future__ import annotations

import torch
from torch import nn

from sana_app.model.network import TrigFlowTeacher


class LocalBatchNorm(nn.Module):
    """Normalises each channel over groups of `group` samples and all tokens: no running statistics, so real and fake cannot leak."""

    def __init__(self, channels: int, group: int = 8):
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D, N] -> [B, D, N]."""
        batch, channels, tokens = x.shape
        group = self.group if batch % self.group == 0 else batch
        y = x.float().reshape(batch // group, group, channels, tokens)
        mean = y.mean(dim=(1, 3), keepdim=True)
        y = (y - mean) * torch.rsqrt((y - mean).square().mean(dim=(1, 3), keepdim=True) + 1e-5)
        return y.reshape(x.shape) * self.weight[:, None] + self.bias[:, None]


class Head(nn.Module):
    """Tokens [B, N, D] of one block -> logits [B, N]."""

    def __init__(self, width: int):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.enter = nn.Sequential(norm(nn.Conv1d(width, width, 1)), LocalBatchNorm(width), nn.LeakyReLU(0.2))
        self.residual = nn.Sequential(norm(nn.Conv1d(width, width, 9, padding=4, padding_mode="circular")), LocalBatchNorm(width), nn.LeakyReLU(0.2))
        self.exit = norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.enter(tokens.transpose(1, 2))                        # [B, D, N]
        x = (x + self.residual(x)) * 0.5 ** 0.5
        return self.exit(x)[:, 0]                                     # [B, N]


class Discriminator(nn.Module):
    """Frozen `teacher` + trainable heads. `blocks`: which blocks' outputs are judged."""

    def __init__(self, teacher: TrigFlowTeacher, blocks: tuple[int, ...]):
        super().__init__()
        layers = len(teacher.transformer.transformer_blocks)
        if not blocks or max(blocks) >= layers:
            raise ValueError(f"disc_blocks={blocks}: the teacher has blocks 0 to {layers - 1}")
        self.__dict__["teacher"] = teacher  # not a child: its weights are neither trained nor saved with the heads
        self.blocks = blocks
        width = teacher.transformer.config.num_attention_heads * teacher.transformer.config.attention_head_dim
        self.heads = nn.ModuleList(Head(width) for _ in blocks)

    def features(self, x: torch.Tensor, t: torch.Tensor, *args) -> list[torch.Tensor]:
        """Outputs [B, N, D] of the chosen blocks for x = x_t/sigma_data at angle t; gradients flow to x."""
        found: list[torch.Tensor] = []
        hooks = [self.teacher.transformer.transformer_blocks[i].register_forward_hook(lambda m, a, out: found.append(out)) for i in self.blocks]
        try:
            self.teacher(x, t, *args)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def forward(self, x: torch.Tensor, t: torch.Tensor, *args) -> torch.Tensor:
        """-> logits [B, heads · N]."""
        return torch.cat([head(f) for head, f in zip(self.heads, self.features(x, t, *args))], dim=1)
