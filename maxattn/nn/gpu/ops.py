"""The operators `maxattn_nn::moments`, `::batch_norm_act` and its `_backward`: sums by our kernels, and what follows.

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

from maxattn.nn.gpu import kernels
from maxattn.nn.gpu.launching import CHANNELS, COMPILED, PROGRAMS, blocks_of, launch, operator
from maxattn.ops.devices import on_device_of

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
ROWS_OF_MOMENTS, ROWS_OF_SUMS = 64, 32
"""Of a tile."""


@operator("maxattn_nn::moments", mutates_args=())  # type: ignore[untyped-decorator]
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and variance over all but the channels of channels-last `x (B, C, H, W)`, `(C)` in fp32; no gradient."""
    C, M = x.shape[1], x.numel() // x.shape[1]
    rows, parts = _parts(M, C, ROWS_OF_MOMENTS)
    means, squares = (x.new_empty(parts, C, dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        launch(kernels.moments, parts, blocks_of(C, CHANNELS))(
            x, means, squares, M, C, rows, BLOCK_M=ROWS_OF_MOMENTS, BLOCK_C=CHANNELS
        )  # fmt: skip
    counts = (M - rows * torch.arange(parts, device=x.device)).clamp(max=rows).to(torch.float32)[:, None]
    mean = (means * (counts / M)).sum(0)
    return mean, (squares + counts * (means - mean) ** 2).sum(0) / M


@operator("maxattn_nn::batch_norm_act", mutates_args=())  # type: ignore[untyped-decorator]
def batch_norm_act(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """`act((x - mean) * rstd * weight + bias)` of channels-last `x (B, C, H, W)`, whose moments `mean` and `rstd` are.

    The gradient of x is that of a batch norm: it goes through the moments too.
    """
    z = (x.float() - _each(mean)) * _each(rstd * weight) + _each(bias)
    return ACTIVATIONS[act](z).to(x.dtype)


@operator("maxattn_nn::batch_norm_act_backward", mutates_args=())  # type: ignore[untyped-decorator]
def batch_norm_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, like x, and those of weight and bias, `(C)` in fp32, from `dy (B, C, H, W)` of the output."""
    dy, C, M = dy.contiguous(memory_format=torch.channels_last), x.shape[1], x.numel() // x.shape[1]
    rows, parts = _parts(M, C, ROWS_OF_SUMS)
    of_gradient, of_product = (x.new_empty(parts, C, dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        launch(kernels.sums, parts, blocks_of(C, CHANNELS))(
            x, dy, mean, rstd, weight, bias, of_gradient, of_product, M, C, rows,
            ACT=act, BLOCK_M=ROWS_OF_SUMS, BLOCK_C=CHANNELS,
        )  # fmt: skip
    dbias, dweight = of_gradient.sum(0), of_product.sum(0)
    normal = (x.float() - _each(mean)) * _each(rstd)
    g = SLOPES[act](dy.float(), normal * _each(weight) + _each(bias))
    dx = _each(weight * rstd) * (g - _each(dbias / M) - normal * _each(dweight / M))
    return dx.to(x.dtype), dweight, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight, bias = ctx.saved_tensors[3:]
    dx, dweight, dbias = batch_norm_act_backward(dy, *ctx.saved_tensors, ctx.act)
    of_each = (dx, None, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None)
    return tuple(one if asked else None for one, asked in zip(of_each, ctx.needs_input_grad, strict=True))


batch_norm_act.register_autograd(_backward, setup_context=_keep)

if not COMPILED:

    @moments.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
        return mean, var

    @batch_norm_act.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    @batch_norm_act_backward.register_fake  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
        return torch.empty_like(x), dweight, dbias


def _each(of_channels: Tensor) -> Tensor:
    """`(C, 1, 1)`, for each pixel of an image."""
    return of_channels[:, None, None]


def _parts(M: int, C: int, rows: int) -> tuple[int, int]:
    """Rows of a part, a multiple of a tile's `rows`, and how many parts there are."""
    wanted = max(1, PROGRAMS // blocks_of(C, CHANNELS))
    rows = rows * blocks_of(blocks_of(M, wanted), rows)
    return rows, blocks_of(M, rows)
