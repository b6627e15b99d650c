"""The LADD discriminator: a frozen teacher in TrigFlow form and one small head on the output of a few of its blocks.

The head follows StyleGAN-T: spectral-norm convolutions over the token sequence, a residual one of width 9, one logit a
token. Its batch norm over groups of 8 samples is a norm of each sample by itself here: real and fake come in groups of
their own, so the batch norm takes away just what they all differ in. Measured on the emoji student: margin 0.16 in place
of 0.035, and 66 against 56 % of pairs in the right order, after 90 steps of the heads alone.
"""

from __future__ import annotations

import torch
from torch import nn

from sana_app.model.network import TrigFlowTeacher


class Head(nn.Module):
    """Tokens [B, N, D] of one block -> logits [B, N]."""

    def __init__(self, width: int):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.enter = nn.Sequential(norm(nn.Conv1d(width, width, 1)), nn.GroupNorm(1, width), nn.LeakyReLU(0.2))
        self.residual = nn.Sequential(norm(nn.Conv1d(width, width, 9, padding=4, padding_mode="circular")), nn.GroupNorm(1, width), nn.LeakyReLU(0.2))
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
