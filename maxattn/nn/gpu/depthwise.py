"""A depthwise convolution for training: the operators `maxattn_nn::depthwise` and `::depthwise_backward`.

They are `triton_op`s, so a compiler launches the kernels itself; in Triton's interpreter they are opaque operators.
Padding is no copy, and may differ on each side. Importing this imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maxattn.nn.gpu import depthwise_kernels as kernels
from maxattn.nn.gpu.launching import CHANNELS, COMPILED, PROGRAMS, asked, blocks_of, launch, operator, parts_of
from maxattn.ops.devices import on_device_of

COLUMNS = {3: 8, 5: 8, 7: 4}
"""Of a tile, by the size of the kernel, all weights of which a thread holds for its channels."""
ROWS = {1: 7, 2: 4}
"""Of a tile, by the stride."""


def convolve(x: Tensor, weight: Tensor, stride: int, pads: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """The depthwise convolution of a channels-last `x (B, C, H, W)` with `weight (C, 1, k, k)`, channels-last too.

    `pads` are the zeros around it, ((top, bottom), (left, right)). Products are summed in fp32, the weight's digits are
    all used, and the output is in the dtype of x.
    """
    oh, ow = ((size + sum(pad) - weight.shape[2]) // stride + 1 for size, pad in zip(x.shape[2:], pads, strict=True))
    out: Tensor = depthwise(x, weight, stride, pads[0][0], pads[1][0], oh, ow)
    return out


@operator("maxattn_nn::depthwise", mutates_args=())  # type: ignore[untyped-decorator]
def depthwise(x: Tensor, weight: Tensor, stride: int, top: int, left: int, oh: int, ow: int) -> Tensor:
    """`(B, C, oh, ow)` of `x (B, C, H, W)`, both channels-last: so many zeros before x, and after it as many as needed.

    `weight (C, 1, k, k)` may be in another dtype; the output is in that of x.
    """
    out = _images(x, oh, ow)
    _forward(x, _taps(weight), out, stride, top, left)
    return out


@operator("maxattn_nn::depthwise_backward", mutates_args=())  # type: ignore[untyped-decorator]
def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, top: int, left: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, like them, from `dy (B, C, oh, ow)` of the output; empty is what is not needed."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    dy, last = dy.contiguous(memory_format=torch.channels_last), weight.shape[2] - 1
    if need_dx:
        dx = torch.empty_like(x)
        if stride == 1:
            _forward(dy, _taps(weight).flip(0, 1), dx, 1, last - top, last - left)
        else:
            _data_gradient(dy, _taps(weight), dx, top, left)
    if need_dweight:
        sums = _weight_gradient(dy, x, last + 1, stride, top, left)
        dweight = sums.t().to(weight.dtype).clone(memory_format=torch.contiguous_format).view(weight.shape)
    return dx, dweight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.stride, ctx.top, ctx.left, _, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:2]
    gradients = depthwise_backward(dy, *ctx.saved_tensors, ctx.stride, ctx.top, ctx.left, *needed)
    return asked(ctx, *gradients, *(None,) * 5)


depthwise.register_autograd(_backward, setup_context=_keep)

if not COMPILED:

    @depthwise.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, stride: int, top: int, left: int, oh: int, ow: int) -> Tensor:
        return _images(x, oh, ow)

    @depthwise_backward.register_fake  # type: ignore[untyped-decorator]
    def _(
        dy: Tensor, x: Tensor, weight: Tensor, stride: int, top: int, left: int, need_dx: bool, need_dweight: bool
    ) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(x) if need_dx else x.new_empty(0)
        return dx, weight.new_empty(weight.shape if need_dweight else 0)


def _forward(x: Tensor, taps: Tensor, out: Tensor, stride: int, top: int, left: int) -> None:
    (B, C, H, W), (oh, ow), kernel = x.shape, out.shape[2:], int(taps.shape[0])
    columns, channels = _block(kernel, ow)
    with on_device_of(x):
        launch(kernels.forward, B * _tiles(oh, ow, ROWS[stride], columns) * blocks_of(C, channels))(
            x, taps, out, H, W, C, oh, ow, top, left,
            K=kernel, STRIDE=stride, ROWS=ROWS[stride], BLOCK_W=columns, BLOCK_C=channels,
        )  # fmt: skip


def _data_gradient(dy: Tensor, taps: Tensor, dx: Tensor, top: int, left: int) -> None:
    """At a stride of 2."""
    (B, C, H, W), (oh, ow), kernel = dx.shape, dy.shape[2:], int(taps.shape[0])
    columns, channels = _block(kernel, ow)
    rows, width = ((size - 1 + before) // 2 - before // 2 + 1 for size, before in ((H, top), (W, left)))
    with on_device_of(dy):
        launch(kernels.data_gradient, B * _tiles(rows, width, ROWS[2], columns) * blocks_of(C, channels))(
            dy, taps, dx, H, W, C, oh, ow, top, left, K=kernel, ROWS=ROWS[2], BLOCK_W=columns, BLOCK_C=channels
        )


def _weight_gradient(dy: Tensor, x: Tensor, kernel: int, stride: int, top: int, left: int) -> Tensor:
    """`(kernel ** 2, C)` in fp32."""
    (B, C, H, W), (oh, ow), kernel = x.shape, dy.shape[2:], int(kernel)
    columns, channels = _block(kernel, ow)
    tiles, blocks = B * _tiles(oh, ow, ROWS[stride], columns), blocks_of(C, channels)
    each, parts = parts_of(tiles, 1, PROGRAMS // blocks)
    sums = x.new_empty(parts, kernel**2, C, dtype=torch.float32)
    with on_device_of(x):
        launch(kernels.weight_gradient, parts * blocks)(
            dy, x, sums, tiles, H, W, C, oh, ow, top, left, each,
            K=kernel, STRIDE=stride, ROWS=ROWS[stride], BLOCK_W=columns, BLOCK_C=channels,
        )  # fmt: skip
    return sums.sum(0)


def _images(x: Tensor, height: int, width: int) -> Tensor:
    """As many channels-last images as x has, of another size, not yet computed.

    Said without a memory format, for which a compiler would fill them with zeros.
    """
    return x.new_empty(x.shape[0], height, width, x.shape[1]).permute(0, 3, 1, 2)


def _taps(weight: Tensor) -> Tensor:
    """`(k, k, C)` of `(C, 1, k, k)`."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def _block(kernel: int, width: int) -> tuple[int, int]:
    """Columns and channels of a tile: where the image is narrow, more channels instead of columns beside it."""
    columns = COLUMNS[kernel]
    return (columns // 2, CHANNELS * 2) if 2 * width <= columns else (columns, CHANNELS)


def _tiles(height: int, width: int, rows: int, columns: int) -> int:
    """How many an image has."""
    return blocks_of(height, rows) * blocks_of(width, columns)
