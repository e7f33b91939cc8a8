"""Small parts that every layer uses: activations, norms, layer scale, stochastic depth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of `(B, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm(name: str, width: int, eps: float = 1e-3, momentum: float = 0.1) -> nn.Module:
    """A norm for `(B, C, H, W)`: "batch_norm", "group_norm" (32 groups, or the most that divide) or "layer_norm"."""
    if name == "batch_norm":
        return nn.BatchNorm2d(width, eps=eps, momentum=momentum)
    if name == "group_norm":
        return nn.GroupNorm(max(groups for groups in range(1, 33) if width % groups == 0), width, eps=eps)
    return LayerNorm2d(width, eps=eps)


def token_norm(name: str, width: int, eps: float = 1e-5) -> nn.Module:
    """A norm over the last dimension: "layer_norm" or "rms_norm"."""
    return nn.LayerNorm(width, eps=eps) if name == "layer_norm" else nn.RMSNorm(width, eps=eps)


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, section 2)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.scale = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class DropPath(nn.Module):
    """Stochastic depth: in training, each sample's update is dropped with probability `rate`, or scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - self.rate)
        return x * (kept / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def update(width: int, layer_scale: float, drop_path: float) -> nn.Sequential:
    """What a residual passes through before it is added: layer scale if not 0, stochastic depth if not 0."""
    scale = [LayerScale(width, layer_scale)] if layer_scale else []
    return nn.Sequential(*scale, *([DropPath(drop_path)] if drop_path else []))
