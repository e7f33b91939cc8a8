"""A Linear with the norm or the activation before it, of which the input alone is kept.

The operators are `maxattn_nn::layer_norm_linear`, `::activation_linear` and their `_backward`; what a compiler makes of
them is told in `batch_norm`. Importing this imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maxattn.nn.gpu import token_kernels as kernels
from maxattn.nn.gpu.batch_norm import ACTIVATIONS
from maxattn.nn.gpu.launching import COMPILED, PROGRAMS, asked, blocks_of, launch, operator, parts_of
from maxattn.ops.devices import on_device_of

TILE, ROWS, CHANNELS = 2048, 32, 128
"""Elements of a tile of whole rows; rows and channels of any other."""


@operator("maxattn_nn::layer_norm_linear", mutates_args=())  # type: ignore[untyped-decorator]
def layer_norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, matrix: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x `(..., C)` again, and the Linear with `matrix (N, C)` of its norm over C, in the dtype of the matrix.

    What else reads x is to read it from here: then its gradient is added in the same pass.
    """
    y = F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps)
    return x.clone(), F.linear(y.to(matrix.dtype), matrix, offset)


@operator("maxattn_nn::layer_norm_linear_backward", mutates_args=())  # type: ignore[untyped-decorator]
def layer_norm_linear_backward(
    skip: Tensor, dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, like x, of weight and bias, in fp32, and of the matrix and the offset, in their dtype."""
    C = x.shape[-1]
    (rows, skip), dout = (one.contiguous().view(-1, C) for one in (x, skip)), dout.reshape(-1, matrix.shape[0])
    dy = dout @ matrix
    block, M = _power_of_2(C), rows.shape[0]
    tile = max(1, TILE // block)
    each, parts = parts_of(M, tile, PROGRAMS // 4)
    dx, y, of_both = torch.empty_like(rows), torch.empty_like(dy), _sums(x, 2, parts, C)
    with on_device_of(x):
        launch(kernels.layer_norm_backward, parts)(
            dy, skip, rows, weight, bias, dx, y, of_both, eps, parts, M, C, each,
            BLOCK_M=tile, BLOCK_C=block, STAGES=3,
        )  # fmt: skip
    dweight, dbias = of_both.sum(1).unbind(0)
    return dx.view(x.shape), dweight.clone(), dbias.clone(), dout.t() @ y, dout.sum(0)


@operator("maxattn_nn::activation_linear", mutates_args=())  # type: ignore[untyped-decorator]
def activation_linear(x: Tensor, bias: Tensor, act: str, matrix: Tensor, offset: Tensor) -> Tensor:
    """The Linear with `matrix (N, C)` of the activation of `x + bias`, x `(..., C)`."""
    return F.linear(ACTIVATIONS[act](x.float() + bias).to(x.dtype), matrix, offset)


@operator("maxattn_nn::activation_linear_backward", mutates_args=())  # type: ignore[untyped-decorator]
def activation_linear_backward(
    dout: Tensor, x: Tensor, bias: Tensor, act: str, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, like x, of bias, in fp32, and of the matrix and the offset, in their dtype."""
    C = x.shape[-1]
    rows, dout = x.contiguous().view(-1, C), dout.reshape(-1, matrix.shape[0])
    dy = dout @ matrix
    M, blocks = rows.shape[0], blocks_of(C, CHANNELS)
    each, parts = parts_of(M, ROWS, PROGRAMS // blocks)
    dx, y, of_bias = torch.empty_like(rows), torch.empty_like(rows), _sums(x, parts, C)
    with on_device_of(x):
        launch(kernels.activation_backward, parts, blocks)(
            dy, rows, bias, dx, y, of_bias, M, C, each, ACT=act, BLOCK_M=ROWS, BLOCK_C=CHANNELS, STAGES=3
        )
    return dx.view(x.shape), of_bias.sum(0), dout.t() @ y, dout.sum(0)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, matrix, _ = inputs
    ctx.save_for_backward(x, weight, bias, matrix)


def _norm_backward(ctx: Any, skip: Tensor, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias, matrix = ctx.saved_tensors
    dx, dweight, dbias, *of_linear = layer_norm_linear_backward(skip, dout, x, weight, bias, ctx.eps, matrix)
    return asked(ctx, dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, *of_linear)


def _keep_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.act, matrix, _ = inputs
    ctx.save_for_backward(x, bias, matrix)


def _activation_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, bias, matrix = ctx.saved_tensors
    dx, dbias, *of_linear = activation_linear_backward(dout, x, bias, ctx.act, matrix)
    return asked(ctx, dx, dbias.to(bias.dtype), None, *of_linear)


layer_norm_linear.register_autograd(_norm_backward, setup_context=_keep_norm)
activation_linear.register_autograd(_activation_backward, setup_context=_keep_activation)

if not COMPILED:

    @layer_norm_linear.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, matrix: Tensor, offset: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), matrix.new_empty(*x.shape[:-1], matrix.shape[0])

    @layer_norm_linear_backward.register_fake  # type: ignore[untyped-decorator]
    def _(
        skip: Tensor, dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, matrix: Tensor
    ) -> tuple[Tensor, ...]:
        C = x.shape[-1]
        return torch.empty_like(x), _sums(x, C), _sums(x, C), torch.empty_like(matrix), matrix.new_empty(len(matrix))

    @activation_linear.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, bias: Tensor, act: str, matrix: Tensor, offset: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], matrix.shape[0])

    @activation_linear_backward.register_fake  # type: ignore[untyped-decorator]
    def _(dout: Tensor, x: Tensor, bias: Tensor, act: str, matrix: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(x), _sums(x, x.shape[-1]), torch.empty_like(matrix), matrix.new_empty(len(matrix))


def _sums(x: Tensor, *size: int) -> Tensor:
    """In fp32, to be filled."""
    return x.new_empty(size, dtype=torch.float32)


def _power_of_2(size: int) -> int:
    """The least that is not smaller."""
    return 1 << (size - 1).bit_length()
