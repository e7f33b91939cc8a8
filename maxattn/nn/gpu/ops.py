"""The operators `maxattn_nn::batch_norm_act` and `::batch_norm_act_backward`: sums by our kernels, and what follows.

They are `triton_op`s, so a compiler sees what they are made of: it launches the kernels itself, fuses the rest with
what stands around it, and computes that again in the backward pass rather than keep it. In Triton's interpreter, where
there is nothing to launch, the same functions are opaque operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from maxattn.nn.gpu import kernels
from maxattn.ops.devices import on_device_of

COMPILED = isinstance(kernels.moments, JITFunction)
_operator: Callable[..., Any] = triton_op if COMPILED else custom_op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dy, z: dy,
    "relu": lambda dy, z: torch.ops.aten.threshold_backward(dy, z, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, z: torch.ops.aten.gelu_backward(dy, z, approximate="tanh"),
}
"""The gradient before each activation, of that after it and of what went in."""
ROWS, CHANNELS = 32, 64
"""Of a tile."""
PROGRAMS = 1056
"""About how many of them sum over rows: 8 on each multiprocessor of an H200."""


@_operator("maxattn_nn::batch_norm_act", mutates_args=())  # type: ignore[untyped-decorator]
def batch_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """`act(batch_norm(x))` of contiguous `x (..., C)`, like x; and the mean and variance of its rows, `(C)` in fp32.

    These two have no gradient: they are for running statistics.
    """
    C, M = x.shape[-1], x.numel() // x.shape[-1]
    rows, parts = _parts(M, C)
    means, squares = (x.new_empty(parts, C, dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        _launch(kernels.moments, parts, C)(x, means, squares, M, C, rows, BLOCK_M=ROWS, BLOCK_C=CHANNELS)
    counts = (M - rows * torch.arange(parts, device=x.device)).clamp(max=rows).to(torch.float32)[:, None]
    mean = (means * (counts / M)).sum(0)
    var = (squares + counts * (means - mean) ** 2).sum(0) / M
    z = (x.float() - mean[None]) * torch.rsqrt(var + eps)[None] * weight + bias
    return ACTIVATIONS[act](z).to(x.dtype), mean, var


@_operator("maxattn_nn::batch_norm_act_backward", mutates_args=())  # type: ignore[untyped-decorator]
def batch_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, like x, and those of weight and bias, `(C)` in fp32, from `dy (..., C)` of the output."""
    dy, C, M = dy.contiguous(), x.shape[-1], x.numel() // x.shape[-1]
    rows, parts = _parts(M, C)
    of_gradient, of_product = (x.new_empty(parts, C, dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        _launch(kernels.sums, parts, C)(
            x, dy, mean, rstd, weight, bias, of_gradient, of_product, M, C, rows,
            ACT=act, BLOCK_M=ROWS, BLOCK_C=CHANNELS,
        )  # fmt: skip
    dbias, dweight = of_gradient.sum(0), of_product.sum(0)
    normal = (x.float() - mean) * rstd
    g = SLOPES[act](dy.float(), normal * weight + bias)
    dx = weight * rstd * (g - (dbias + normal * dweight) / M)
    return dx.to(x.dtype), dweight, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (x, weight, bias, eps, ctx.act), (_, mean, var) = inputs, output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, torch.rsqrt(var + eps))


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = batch_norm_act_backward(dy, x, weight, bias, mean, rstd, ctx.act)
    of_each = (dx, dweight.to(weight.dtype), dbias.to(bias.dtype))
    return (*(one if asked else None for one, asked in zip(of_each, ctx.needs_input_grad, strict=False)), None, None)


batch_norm_act.register_autograd(_backward, setup_context=_keep)

if not COMPILED:

    @batch_norm_act.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> tuple[Tensor, ...]:
        return torch.empty_like(x), *(x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))

    @batch_norm_act_backward.register_fake  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(x), *(x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))


def _parts(M: int, C: int) -> tuple[int, int]:
    """Rows of a part, a multiple of a tile's, and how many parts there are."""
    wanted = max(1, PROGRAMS // _tiles(C, CHANNELS))
    rows = ROWS * _tiles(_tiles(M, wanted), ROWS)
    return rows, _tiles(M, rows)


def _tiles(size: int, block: int) -> int:
    return (size + block - 1) // block


def _launch(function: Any, rows: int, channels: int) -> Any:
    return (wrap_triton(function) if COMPILED else function)[(rows, _tiles(channels, CHANNELS))]
