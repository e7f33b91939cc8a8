"""The sums over pixels of a batch norm with what comes after it, forward and backward. In Triton.

Rows are pixels: `(M, C)` is a channels-last batch of images. They are summed in parts of as many rows each, by one
program and in a fixed order, so that results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.nn.gpu.arithmetic import activate, before, rounded


@triton.jit
def moments(x, means, squares, M, C, ROWS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """`means, squares (parts, C)` of ROWS rows of `x (M, C)` each: the mean, and the sum of squared distances from it.

    All is summed from the mean of the first tile on, so that a mean that is large beside the deviation costs no digits;
    in the dtype of x, else all distances of 16 bits would be rounded the same way.
    """
    part, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, rows = channel < C, tl.minimum(ROWS, M - part * ROWS)
    x += part.to(tl.int64) * ROWS * C
    row = tl.arange(0, BLOCK_M)
    inside, at = (row < rows)[:, None] & exists[None, :], row[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    nearby = rounded(tl.sum(value, 0) / tl.minimum(rows, BLOCK_M), x.dtype.element_ty)
    shift = nearby.to(tl.float32)
    total, square = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_M):
        inside = (start + row < rows)[:, None] & exists[None, :]
        distance = tl.load(x + start * C + at, mask=inside, other=nearby[None, :]).to(tl.float32) - shift[None, :]
        total += distance
        square += distance * distance
    sums = tl.sum(total, 0)
    mean = sums / rows
    tl.store(means + part * C + channel, shift + mean, mask=exists)
    least = tl.maximum(tl.sum(square, 0) - sums * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(squares + part * C + channel, least, mask=exists)


@triton.jit
def merge_moments(
    means, squares, weight, mean, var, rstd, scale, eps, parts, M, C, ROWS, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The moments of all parts, `mean, var, rstd (C)`, and `scale (C)`, rstd times weight (Chan et al., 1979)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, part = channel < C, tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        share = tl.minimum(M - (start + part) * ROWS, ROWS)[:, None].to(tl.float32) / M
        at, inside = (start + part)[:, None] * C + channel[None, :], (start + part < parts)[:, None] & exists[None, :]
        total += tl.load(means + at, mask=inside, other=0.0) * share
    centre = tl.sum(total, 0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        rows = tl.minimum(M - (start + part) * ROWS, ROWS)[:, None].to(tl.float32)
        at, inside = (start + part)[:, None] * C + channel[None, :], (start + part < parts)[:, None] & exists[None, :]
        distance = tl.load(means + at, mask=inside, other=0.0) - centre[None, :]
        total += tl.where(inside, tl.load(squares + at, mask=inside, other=0.0) + rows * distance * distance, 0.0)
    variance = tl.sum(total, 0) / M
    deviation = tl.rsqrt(variance + tl.full((), eps, tl.float32))  # a compiler passes Python's floats in fp64
    tl.store(mean + channel, centre, mask=exists)
    tl.store(var + channel, variance, mask=exists)
    tl.store(rstd + channel, deviation, mask=exists)
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    tl.store(scale + channel, deviation * w, mask=exists)


@triton.jit
def rows_of(part, M, ROWS, PER):
    """Where the part's rows start, and how many there are: PER parts an image, which has M rows."""
    image, first = part // PER, (part % PER) * ROWS
    return image, image.to(tl.int64) * M + first, tl.minimum(ROWS, M - first)


@triton.jit
def sums(
    x, dy, mean, scale, bias, gate, shift, of_gradient, of_product, M, C, ROWS, PER,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`of_gradient, of_product (parts, C)`: sums of g, the gradient before the activation, and of `g (x - mean)`.

    The gradient after the activation is dy, or with GATED `dy gate + shift`, of which those are `(images, C)`.
    """
    part, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < C
    image, first, rows = rows_of(part, M, ROWS, PER)
    x += first * C
    dy += first * C
    centre = tl.load(mean + channel, mask=exists, other=0.0)[None, :]
    factor = tl.load(scale + channel, mask=exists, other=0.0)[None, :]
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    if GATED:
        by = tl.load(gate + image * C + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
        more = tl.load(shift + image * C + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    alone, product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    row = tl.arange(0, BLOCK_M)
    at = row[:, None] * C + channel[None, :]
    for start in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        inside = (start + row < rows)[:, None] & exists[None, :]
        distance = tl.load(x + start * C + at, mask=inside, other=0.0).to(tl.float32) - centre
        after = tl.load(dy + start * C + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            after = tl.where(inside, after * by + more, 0.0)
        g = before(after, distance * factor + b, ACT)
        alone += g
        product += g * distance
    tl.store(of_gradient + part * C + channel, tl.sum(alone, 0), mask=exists)
    tl.store(of_product + part * C + channel, tl.sum(product, 0), mask=exists)


@triton.jit
def gate_backward(
    dy, x, mean, scale, bias, gate, y, of_gate, M, C, ROWS, PER,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of `y = a gate`, a the activation of the norm of x: y again, and `of_gate (parts, C)`, the sums of `dy a`.

    `gate` is `(images, C)`.
    """
    part, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < C
    image, first, rows = rows_of(part, M, ROWS, PER)
    x += first * C
    dy += first * C
    y += first * C
    centre = tl.load(mean + channel, mask=exists, other=0.0)[None, :]
    factor = tl.load(scale + channel, mask=exists, other=0.0)[None, :]
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    by = tl.load(gate + image * C + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    row = tl.arange(0, BLOCK_M)
    at = row[:, None] * C + channel[None, :]
    for start in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        inside = (start + row < rows)[:, None] & exists[None, :]
        distance = tl.load(x + start * C + at, mask=inside, other=0.0).to(tl.float32) - centre
        a = rounded(activate(distance * factor + b, ACT), y.dtype.element_ty).to(tl.float32)
        tl.store(y + start * C + at, rounded(a * by, y.dtype.element_ty), mask=inside)
        after = tl.load(dy + start * C + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, a * after, 0.0)  # beyond the last row a may be infinite
    tl.store(of_gate + part * C + channel, tl.sum(total, 0), mask=exists)


@triton.jit
def merge_sums(
    of_gradient, of_product, rstd, scale, dweight, dbias, along_x, along_1, parts, M, C,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`dweight, dbias (C)`, and with them `dx = scale g - along_1 - (x - mean) along_x`."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, part = channel < C, tl.arange(0, BLOCK_P)
    alone, product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        at, inside = (start + part)[:, None] * C + channel[None, :], (start + part < parts)[:, None] & exists[None, :]
        alone += tl.load(of_gradient + at, mask=inside, other=0.0)
        product += tl.load(of_product + at, mask=inside, other=0.0)
    deviation = tl.load(rstd + channel, mask=exists, other=0.0)
    factor = tl.load(scale + channel, mask=exists, other=0.0)
    of_weight, of_bias = tl.sum(product, 0) * deviation, tl.sum(alone, 0)
    tl.store(dweight + channel, of_weight, mask=exists)
    tl.store(dbias + channel, of_bias, mask=exists)
    tl.store(along_x + channel, factor * deviation * (of_weight / M), mask=exists)
    tl.store(along_1 + channel, factor * (of_bias / M), mask=exists)
