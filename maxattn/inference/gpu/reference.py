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
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + act((x * gate) @ weight^T + bias)`, of `x (B, ..., C)` to `(B, ..., N)`.

    `weight (N, C)`, `gate (B, C)`, `residual (B, ..., N)`.

    Example:
        >>> x, gate = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.5]])
        >>> pointwise(x, torch.eye(2), gate=gate, residual=torch.ones(1, 2))
        tensor([[3.0000, 2.5000]])
    """
    if gate is not None:
        x = x * gate.view(len(gate), *(1,) * (x.ndim - 2), -1)
    y = ACTIVATIONS[act](F.linear(x, weight, bias))
    return y if residual is None else residual + y


def norm(x: Tensor, kind: str, eps: float) -> Tensor:
    """A norm of `x (..., C)` over its channels, without weights: "layer_norm" or "rms_norm"; or "none", x itself.

    Example:
        >>> norm(torch.tensor([[1.0, 3.0]]), "layer_norm", 0.0)
        tensor([[-1.,  1.]])
    """
    if kind == "none":
        return x
    return (F.layer_norm if kind == "layer_norm" else F.rms_norm)(x, x.shape[-1:], eps=eps)


def narrow(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none", norm_kind: str = "none", eps: float = 0.0
) -> Tensor:
    """`act(norm(x) @ weight^T + bias)`, of `x (..., C)` to `(..., N)`, with `weight (N, C)`.

    Example:
        >>> narrow(torch.tensor([[1.0, 3.0]]), torch.eye(2), None, "relu", "layer_norm")
        tensor([[0., 1.]])
    """
    return pointwise(norm(x, norm_kind, eps), weight, bias, act)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "none",
    norm_kind: str = "none",
    eps: float = 0.0,
) -> Tensor:
    """`x + act(norm(x) @ weight1^T + bias1) @ weight2^T + bias2`, of `x (..., C)`."""
    return pointwise(narrow(x, weight1, bias1, act, norm_kind, eps), weight2, bias2, residual=x)


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


def pool(x: Tensor, kernel: int, stride: int, padding: int, padded: bool) -> Tensor:
    """Means of `kernel` x `kernel` pixels of `x (B, H, W, C)`, to `(B, ceil(H / stride), ceil(W / stride), C)`.

    Pixels outside are zeros, which count if `padded`, and else do not.

    Example:
        >>> pool(torch.arange(6.0).view(1, 2, 3, 1), 2, 2, 0, False).flatten()
        tensor([2.0000, 3.5000])
    """
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, not padded, padded)
    return pooled.permute(0, 2, 3, 1)
