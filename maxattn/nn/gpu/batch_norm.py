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

from maxattn.nn.gpu import batch_norm_kernels as kernels
from maxattn.nn.gpu.launching import CHANNELS, COMPILED, PROGRAMS, asked, blocks_of, launch, operator, parts_of
from maxattn.ops.devices import on_device_of

TWICE, CUBIC = 1.5957691216057308, 0.044715
"""GELU with tanh is `x sigmoid(2 u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`: twice the root, and the cube's factor."""


def _gate(z: Tensor) -> Tensor:
    return torch.sigmoid(TWICE * z * (1 + CUBIC * z * z))


def _gelu_tanh_backward(dy: Tensor, z: Tensor) -> Tensor:
    s = _gate(z)
    return dy * (s + z * s * (1 - s) * (TWICE * (1 + 3 * CUBIC * z * z)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: z * _gate(z),
}
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dy, z: dy,
    "relu": lambda dy, z: torch.ops.aten.threshold_backward(dy, z, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": _gelu_tanh_backward,
}
"""The gradient before each activation, of that after it and of what went in."""
ROWS_OF_MOMENTS, ROWS_OF_SUMS = 64, 32
"""Of a tile."""
MOST_ROWS = 1024
"""About, of a part where parts are of one image each."""
MERGED = {"BLOCK_P": 256, "BLOCK_C": 16}
"""Parts and channels of a tile where the sums of parts are added up."""


@operator("maxattn_nn::moments", mutates_args=())  # type: ignore[untyped-decorator]
def moments(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all but the channels of channels-last `x (B, C, H, W)`: mean, variance, `1 / sqrt(variance + eps)` and that
    times `weight (C)`; each `(C)` in fp32, without a gradient.
    """
    C, M = x.shape[1], x.numel() // x.shape[1]
    rows, parts = parts_of(M, ROWS_OF_MOMENTS, PROGRAMS // blocks_of(C, CHANNELS))
    means, squares = (of_channels(x, parts) for _ in range(2))
    mean, var, rstd, scale = (of_channels(x) for _ in range(4))
    with on_device_of(x):
        launch(kernels.moments, parts, blocks_of(C, CHANNELS))(
            x, means, squares, M, C, rows, BLOCK_M=ROWS_OF_MOMENTS, BLOCK_C=CHANNELS
        )  # fmt: skip
        launch(kernels.merge_moments, blocks_of(C, MERGED["BLOCK_C"]))(
            means, squares, weight, mean, var, rstd, scale, eps, parts, M, C, rows, **MERGED
        )  # fmt: skip
    return mean, var, rstd, scale


@operator("maxattn_nn::batch_norm_act", mutates_args=())  # type: ignore[untyped-decorator]
def batch_norm_act(
    x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, act: str
) -> Tensor:
    """`act((x - mean) * scale + bias)` of channels-last `x (B, C, H, W)`, the rest `(C)`; its moments are x's.

    `scale` is `rstd * weight`, and its gradient goes to weight. That of x goes through the moments too.
    """
    z = (x.float() - each(mean)) * each(scale) + each(bias)
    return ACTIVATIONS[act](z).to(x.dtype)


@operator("maxattn_nn::batch_norm_act_backward", mutates_args=())  # type: ignore[untyped-decorator]
def batch_norm_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, like x, and those of weight and bias, `(C)` in fp32, from `dy (B, C, H, W)` of the output."""
    return norm_gradients(dy.contiguous(memory_format=torch.channels_last), x, mean, rstd, scale, bias, act)


def norm_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    bias: Tensor,
    act: str,
    gates: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a channels-last dy, or of `dy gate + shift` with these as `gates`, `(B, C)` each."""
    B, C, H, W = x.shape
    if gates is None:
        images, M = 1, B * H * W
        rows, per = parts_of(M, ROWS_OF_SUMS, PROGRAMS // blocks_of(C, CHANNELS))
    else:
        images, M = B, H * W
        rows, per = parts_of_image(M, ROWS_OF_SUMS)
    of_gradient, of_product = (of_channels(x, images * per) for _ in range(2))
    dweight, dbias, along_x, along_1 = (of_channels(x) for _ in range(4))
    with on_device_of(x):
        launch(kernels.sums, images * per, blocks_of(C, CHANNELS))(
            x, dy, mean, scale, bias, *(gates or (scale, scale)), of_gradient, of_product, M, C, rows, per,
            ACT=act, GATED=gates is not None, BLOCK_M=ROWS_OF_SUMS, BLOCK_C=CHANNELS, STAGES=3,
        )  # fmt: skip
        launch(kernels.merge_sums, blocks_of(C, MERGED["BLOCK_C"]))(
            of_gradient, of_product, rstd, scale, dweight, dbias, along_x, along_1, images * per, B * H * W, C, **MERGED
        )  # fmt: skip
    after = dy.float() if gates is None else dy.float() * each(gates[0].float()) + each(gates[1])
    distance = x.float() - each(mean)  # as forward, so that a compiler that computes both does it once
    g = SLOPES[act](after, distance * each(scale) + each(bias))
    dx = each(scale) * g - each(along_1) - distance * each(along_x)
    return dx.to(x.dtype), dweight, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, mean, rstd, scale, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = batch_norm_act_backward(dy, x, mean, rstd, scale, bias, ctx.act)
    return asked(ctx, dx, None, None, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None)


batch_norm_act.register_autograd(_backward, setup_context=_keep)

if not COMPILED:

    @moments.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return tuple(of_channels(x) for _ in range(4))

    @batch_norm_act.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    @batch_norm_act_backward.register_fake  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), of_channels(x), of_channels(x)


def each(of_channels: Tensor) -> Tensor:
    """`(..., C, 1, 1)` of `(..., C)`: for each pixel of an image."""
    return of_channels.view(*of_channels.shape, 1, 1)


def of_channels(x: Tensor, *parts: int) -> Tensor:
    """`(*parts, C)` of fp32, to be filled."""
    return x.new_empty(*parts, x.shape[1], dtype=torch.float32)


def parts_of_image(M: int, tile: int) -> tuple[int, int]:
    """Rows of a part of an image of M, whole tiles of them, and how many parts it has; of however many images."""
    return parts_of(M, tile, blocks_of(M, MOST_ROWS))
