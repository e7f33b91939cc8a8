"""Classifier heads: NHWC features to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Global average pool, LayerNorm, optionally Linear and tanh, dropout, Linear.

    Shapes: `(B, H, W, width)` to `(B, num_classes)`. With `hidden=None` there is no first Linear; with
    `num_classes=0` no last one.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        hidden: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pre_logits = None if hidden is None else nn.Linear(width, hidden)
        self.drop = nn.Dropout(dropout)
        self.features = width if hidden is None else hidden
        self.bias = bias
        self.fc = nn.Linear(self.features, num_classes, bias=bias) if num_classes else None

    def forward(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x_BHWC.mean((1, 2)))
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        x = self.drop(x)
        return x if pre_logits or self.fc is None else self.fc(x)

    def reset(self, num_classes: int) -> None:
        """A new last Linear for `num_classes`; 0 for none."""
        like = self.norm.weight
        self.fc = None
        if num_classes:
            self.fc = nn.Linear(self.features, num_classes, bias=self.bias, device=like.device, dtype=like.dtype)
