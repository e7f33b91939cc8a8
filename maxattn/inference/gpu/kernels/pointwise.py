"""A 1x1 convolution or Linear, with what stands before and after it in the network."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.inference.gpu.kernels.common import activate, dot, in_fp32, rounded, tile_of


@triton.jit
def pointwise(
    x, weight, bias, gate, column_sums, residual, out,
    M, N, K, pixels, eps,
    ACT: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out (M, N) = residual + act(norm(x (M, K) * gate) weight (N, K)^T + bias)`; each part may be left out.

    `gate (B, K)` has a row for every `pixels` rows of x, and is multiplied in while x is loaded. The norm is taken
    after the product, of which it is a function: `((x - mean) / std) W^T = (x W^T - mean sum_k W) / std`. So x is given
    to the tensor cores as it is, and its mean and variance are summed as it passes. They are summed of x less the first
    channel of each row, for a variance does not cancel then; the difference above does so only as far as the rounding
    of x itself has lost more. Of equal channels, whose variance is nothing, the norm is nothing too.

    Offsets are counted from the first element of a tile: only that is a number of 64 bits.
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
        gate_at = (((first - image * pixels).to(tl.int32) + read) // pixels)[:, None] * K + k[None, :]
    if NORM == "layer_norm":
        shift = tl.load(x + read * K).to(tl.float32)
    if NORM != "none":
        total = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (start + k < K)[None, :] | EVEN_K  # whole blocks need no mask
        a = tl.load(x + x_at + start, mask=inside, other=0.0)
        w = tl.load(weight + weight_at + start, mask=inside, other=0.0)
        if NORM != "none":
            value = a.to(tl.float32)
            if NORM == "layer_norm":
                value = tl.where(inside, value - shift[:, None], 0.0)
                total += tl.sum(value, 1)
            squares += tl.sum(value * value, 1)
        if GATED:
            g = tl.load(gate + gate_at + start, mask=inside, other=0.0)
            a = rounded(a.to(tl.float32) * g.to(tl.float32), a.dtype)
        acc = dot(a, tl.trans(w), acc)

    exists = column < columns
    column += tile_n * BLOCK_N
    if NORM == "layer_norm":
        mean = total / K
        variance = tl.maximum(squares / K - mean * mean, 0.0)
        sums = tl.load(column_sums + column, mask=exists, other=0.0)
        scale = tl.where(variance > 0.0, tl.rsqrt(variance + in_fp32(eps)), 0.0)
        acc = (acc - (mean + shift)[:, None] * sums[None, :]) * scale[:, None]
    if NORM == "rms_norm":
        acc *= tl.rsqrt(squares / K + in_fp32(eps))[:, None]
    if BIASED:
        acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    out += first * N
    at = row[:, None] * N + column[None, :]
    written = (row < rows)[:, None] & exists[None, :]
    if ADDED:
        acc += tl.load(residual + first * N + at, mask=written, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=written)
