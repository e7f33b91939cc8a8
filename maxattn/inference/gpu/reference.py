"""What the operators of `maxattn.inference.gpu` compute, in plain PyTorch: each is tested against this, in fp64.

Shapes: B batch, H x W pixels, C channels in, N channels out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    norm: str = "none",
    eps: float = 0.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + act(norm(x * gate) @ weight^T + bias)`, of `x (B, ..., C)` to `(B, ..., N)`.

    `weight (N, C)`, `gate (B, C)`, `residual (B, ..., N)`; `norm` is "none", "layer_norm" or "rms_norm", over the
    channels and without weights.

    Example:
        >>> pointwise(torch.tensor([[1.0, 3.0]]), torch.eye(2), norm="layer_norm", residual=torch.ones(1, 2))
        tensor([[0., 2.]])
    """
    if gate is not None:
        x = x * gate.view(len(gate), *(1,) * (x.ndim - 2), -1)
    if norm == "layer_norm":
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
    if norm == "rms_norm":
        x = F.rms_norm(x, x.shape[-1:], eps=eps)
    y = ACTIVATIONS[act](F.linear(x, weight, bias))
    return y if residual is None else residual + y


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "none",
    norm: str = "none",
    eps: float = 0.0,
) -> Tensor:
    """`x + act(norm(x) @ weight1^T + bias1) @ weight2^T + bias2`, of `x (..., C)`; norms as of `pointwise`."""
    return pointwise(pointwise(x, weight1, bias1, act, norm, eps), weight2, bias2, residual=x)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    stride: int = 1,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
) -> tuple[Tensor, Tensor]:
    """`x (B, H, W, C)` convolved channel by channel with `weight (3, 3, C)`, and the mean `(B, C)` of that over pixels.

    `padding` is that of the top, the bottom, the left and the right.

    Example:
        >>> y, mean = depthwise(torch.ones(1, 3, 4, 2), torch.ones(3, 3, 2), stride=2, padding=(0, 1, 0, 1))
        >>> y[0, :, :, 0], mean
        (tensor([[9., 6.]]), tensor([[7.5000, 7.5000]]))
    """
    y = convolution(
        x.permute(0, 3, 1, 2), weight.permute(2, 0, 1)[..., None], bias, act, stride, padding, len(x.mT[0, 0])
    )
    return y, y.mean((1, 2))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    stride: int = 1,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """`x (B, C, H, W)` convolved with `weight (N, kernel_h, kernel_w, C / groups)`, to `(B, H', W', N)`."""
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    return ACTIVATIONS[act](F.conv2d(x, weight.permute(0, 3, 1, 2), bias, stride, groups=groups)).permute(0, 2, 3, 1)
