"""oneDNN's convolutions and Linears on the CPU: weights packed once, the activation applied where the result is made.

PyTorch's compiler calls these operators for frozen weights. Called here, they serve without it; where they cannot, the
layers take the usual functions.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maxattn.ops.tracing import values_alone

ops = torch.ops.mkldnn


class PostOp(NamedTuple):
    """An activation in oneDNN's words."""

    name: str
    algorithm: str = ""


def post_op(act: nn.Module) -> PostOp | None:
    """What oneDNN calls an activation; None if it has no name for it.

    Example:
        >>> post_op(nn.GELU(approximate="tanh"))
        PostOp(name='gelu', algorithm='tanh')
    """
    if isinstance(act, nn.GELU):
        return PostOp("gelu", act.approximate)
    names = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "swish", nn.Sigmoid: "sigmoid"}
    return PostOp(names[type(act)]) if type(act) in names else None


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operators can be called on these, now: not for derivatives, a compiler or autocast."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and values_alone(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _has(x.dtype)
    )


def pack_linear(weight: Tensor) -> Tensor:
    """`weight (out, in)` in the layout that `linear` takes."""
    return ops._reorder_linear_weight(weight)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, post: PostOp) -> Tensor:
    """`x (..., in)` to `(..., out)`."""
    return ops._linear_pointwise(x, packed, bias, post.name, [], post.algorithm)


def pack_convolution(weight: Tensor, x: Tensor, padding: list[int], stride: list[int], groups: int) -> Tensor:
    """`weight (out, in / groups, height, width)` in the layout that `convolution` of such as `x` takes."""
    return ops._reorder_convolution_weight(weight, padding, stride, [1, 1], groups, list(x.shape))


def convolution(
    x: Tensor, packed: Tensor, bias: Tensor | None, padding: list[int], stride: list[int], groups: int, post: PostOp
) -> Tensor:
    """`x (B, in, H, W)`, channels-last, to `(B, out, H', W')`, channels-last."""
    return ops._convolution_pointwise(x, packed, bias, padding, stride, [1, 1], groups, post.name, [], post.algorithm)


@cache
def _has(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators, and this processor the instructions for the dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())
