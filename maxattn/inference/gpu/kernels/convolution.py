"""A convolution of few channels as a product of matrices, of which the left one is gathered while it is loaded."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.inference.gpu.kernels.common import dot, tile_of
from maxattn.nn.gpu.arithmetic import activate, rounded


@triton.jit
def convolution(
    x, weight, bias, out,
    M, N, H, W, out_H, out_W, stride_b, stride_h, stride_w, stride_c, top, left,
    ACT: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
    CHANNELS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out (B, out_H, out_W, N) = act(x (B, CHANNELS, H, W) * weight (N, KERNEL_H, KERNEL_W, CHANNELS) + bias)`.

    A row of the product, of M in all, is a pixel of the output; k counts the channels of the kernel's pixels. Where
    whole blocks of k lie in one of those, its place is a single number. x may have any strides, and pixels outside are
    zeros that no one has written.
    """
    K: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    tile_m, tile_n = tile_of(N, BLOCK_N)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    read = tl.minimum(row, M - 1)
    image = (read // (out_H * out_W)).to(tl.int64)
    y = read // out_W % out_H * STRIDE - top
    x_column = read % out_W * STRIDE - left
    at = x + (image * stride_b + y.to(tl.int64) * stride_h + x_column.to(tl.int64) * stride_w)[:, None]
    weight_at = weight + tl.minimum(column, N - 1)[:, None] * K + k[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if CHANNELS % BLOCK_K == 0:
            pixel = start // CHANNELS
            down, across = pixel // KERNEL_W, pixel % KERNEL_W
            inside = ((y + down >= 0) & (y + down < H) & (x_column + across >= 0) & (x_column + across < W))[:, None]
            first = down * stride_h + across * stride_w + (start - pixel * CHANNELS).to(tl.int64) * stride_c
            a = tl.load(at + first + k.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
            w = tl.load(weight_at + start)
        else:
            pixel = (start + k) // CHANNELS
            channel = (start + k) % CHANNELS
            down, across = pixel // KERNEL_W, pixel % KERNEL_W
            in_y = (y[:, None] + down[None, :] >= 0) & (y[:, None] + down[None, :] < H)
            in_x = (x_column[:, None] + across[None, :] >= 0) & (x_column[:, None] + across[None, :] < W)
            known = (start + k < K)[None, :]
            offset = down * stride_h + across * stride_w + channel.to(tl.int64) * stride_c
            a = tl.load(at + offset[None, :], mask=in_y & in_x & known, other=0.0)
            w = tl.load(weight_at + start, mask=known, other=0.0)
        acc = dot(a, tl.trans(w), acc)

    exists = column < N
    if BIASED:
        acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    written = (row < M)[:, None] & exists[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], rounded(acc, out.dtype.element_ty), mask=written)
