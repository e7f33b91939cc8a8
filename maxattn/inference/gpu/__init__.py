"""Kernels of our own for a network for inference on a GPU, where no library fuses what it does; in Triton.

These functions take what the layers have. Triton is imported at the first call: `serves` says whether to call at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.inference.gpu import launches
from maxattn.ops.tracing import exporting, runs_triton, values_alone

DEVICES = frozenset({"cuda"})
DTYPES = frozenset({torch.float16, torch.bfloat16})


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can be called on these, now: not for derivatives, autocast, an export or nothing at all."""
    return (
        made_for(x)
        and x.device == weight.device
        and x.dtype == weight.dtype
        and x.numel() > 0
        and values_alone(x, weight)
        and not torch.is_autocast_enabled(x.device.type)
        and not exporting()
    )


def made_for(x: Tensor) -> bool:
    """Whether the kernels are for such a device and dtype."""
    return x.device.type in DEVICES and x.dtype in DTYPES and runs_triton(x.device)


def normed_by(norm: nn.Module) -> tuple[str, float] | None:
    """What the kernels call a norm without weights, and its epsilon; None if it has no name for it.

    Example:
        >>> normed_by(nn.LayerNorm(4, elementwise_affine=False)), normed_by(nn.GroupNorm(1, 4))
        (('layer_norm', 1e-05), None)
    """
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or norm.elementwise_affine or norm.eps is None:
        return None
    return "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm", norm.eps


def kernel_for(weight: Tensor, stride: list[int], groups: int) -> str | None:
    """Which of the functions below computes a convolution with `weight (out, in / groups, height, width)`; or None.

    Example:
        >>> kernel_for(torch.empty(8, 4, 1, 1), [1, 1], 1), kernel_for(torch.empty(8, 1, 5, 5), [1, 1], 8)
        ('pointwise', None)
    """
    out, channels, *sides = weight.shape
    if sides == [1, 1] and stride == [1, 1] and groups == 1:
        return "pointwise"
    if sides == [3, 3] and channels == 1 and groups == out and stride in ([1, 1], [2, 2]):
        return "depthwise"
    gathered = groups == 1 and stride[0] == stride[1] and max(channels, out) <= launches.GATHERED_CHANNELS
    return "convolution" if gathered else None


def is_narrow(channels: int) -> bool:
    """Whether a norm belongs into the product after it, and an MLP into one kernel: of few channels, whose loads can be
    wide."""
    return channels <= launches.NARROW and channels % launches.ALIGNED == 0


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str = "none",
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `reference.pointwise`. A product with only what cuBLASLt does after it is left to cuBLASLt."""
    if gate is None and residual is None and act in launches.LIBRARY:
        if act == "none":
            return F.linear(x, weight, bias)
        if bias is not None:
            y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=act != "relu")
            return y.view(*x.shape[:-1], -1)
    from maxattn.inference.gpu import ops

    return ops.pointwise(x, weight, bias, act, gate, residual)


def after_norm(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, norm: str, eps: float) -> Tensor:
    """As `reference.narrow`, of any number of channels."""
    from maxattn.inference.gpu import ops

    if is_narrow(x.shape[-1]):
        return ops.narrow(x, weight, bias, act, norm, eps)
    return pointwise(ops.norm(x, norm, eps), weight, bias, act)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    norm: str,
    eps: float,
) -> Tensor:
    """As `reference.mlp`, where the channels are narrow."""
    from maxattn.inference.gpu import ops

    return ops.mlp(x, weight1, bias1, weight2, bias2, act, norm, eps)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: list[int], *, pooled: bool
) -> tuple[Tensor, Tensor | None]:
    """As `reference.depthwise`; no mean if not `pooled`."""
    from maxattn.inference.gpu import ops

    y, means = ops.depthwise(x, weight, bias, act, stride, padding, pooled)
    return y, means.sum(1).to(x.dtype) if pooled else None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: list[int]) -> Tensor:
    """As `reference.convolution`, of one group."""
    from maxattn.inference.gpu import ops

    return ops.convolution(x, weight, bias, act, stride, padding)


def pool(x: Tensor, kernel: int, stride: int, padding: int, padded: bool) -> Tensor:
    """As `reference.pool`."""
    from maxattn.inference.gpu import ops

    return ops.pool(x, kernel, stride, padding, padded)
