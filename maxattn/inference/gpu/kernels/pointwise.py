"""A 1x1 convolution or Linear, with what stands before and after it in the network."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.inference.gpu.kernels.common import dot, gated, tile_of
from maxattn.nn.gpu.arithmetic import activate, rounded


@triton.jit
def pointwise(
    x, weight, bias, gate, residual, out,
    M, N, K, pixels,
    ACT: tl.constexpr, GATED: tl.constexpr, SPANNED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out (M, N) = residual + act((x (M, K) * gate) weight (N, K)^T + bias)`; each part may be left out.

    `gate (B, K)` has a row for every `pixels` rows of x, and is multiplied in while x is loaded. With SPANNED the rows
    of a tile are of two images at most, and two rows of the gate are all that is loaded. Offsets are counted from the
    first element of a tile: only that is a number of 64 bits.
    """
    tile_m, tile_n = tile_of(N, BLOCK_N)
    first = (tile_m * BLOCK_M).to(tl.int64)
    rows, columns = M - tile_m * BLOCK_M, N - tile_n * BLOCK_N  # from here on; may be fewer than the tile has
    row, column, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    read = tl.minimum(row, rows - 1)  # a row read twice needs no mask
    x += first * K
    weight += (tile_n * BLOCK_N).to(tl.int64) * K
    x_at = read[:, None] * K + k[None, :]
    weight_at = tl.minimum(column, columns - 1)[:, None] * K + k[None, :]
    if GATED:
        image = first // pixels
        gate += image * K
        row_image = ((first - image * pixels).to(tl.int32) + read) // pixels
        last_image = tl.max(row_image, 0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (start + k < K)[None, :] | EVEN_K  # whole blocks need no mask
        a = tl.load(x + x_at + start, mask=inside, other=0.0)
        w = tl.load(weight + weight_at + start, mask=inside, other=0.0)
        if GATED:
            if SPANNED:
                g0 = tl.load(gate + start + k[None, :], mask=inside, other=0.0)
                g1 = tl.load(gate + last_image * K + start + k[None, :], mask=inside, other=0.0)
                g = tl.where(row_image[:, None] == 0, g0, g1)
            else:
                g = tl.load(gate + row_image[:, None] * K + start + k[None, :], mask=inside, other=0.0)
            a = gated(a, g)
        acc = dot(a, tl.trans(w), acc)

    exists = column < columns
    column += tile_n * BLOCK_N
    if BIASED:
        acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    out += first * N
    at = row[:, None] * N + column[None, :]
    written = (row < rows)[:, None] & exists[None, :]
    if ADDED:
        acc += tl.load(residual + first * N + at, mask=written, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=written)
