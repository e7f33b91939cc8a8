"""The sums over pixels of a batch norm with the activation after it, forward and backward. In Triton.

Rows are pixels: `(M, C)` is a channels-last batch of images. They are summed in parts of as many rows each, by one
program and in a fixed order, so that results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of an activation, of fp32; GELU with tanh is `x sigmoid(2 u)`."""
    if ACT == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        d = s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "silu":
        s = sigmoid(x)
        d = s + x * s * (1.0 - s)
    elif ACT == "relu":
        d = tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
        d = tl.full(x.shape, 1.0, tl.float32)
    return d


@triton.jit
def sigmoid(x):
    """Good to two units in the last place of fp32. A division would take more instructions than all the rest."""
    denominator = 1.0 + tl.exp(-x)
    if INTERPRETED:
        return 1.0 / denominator
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def moments(x, means, squares, M, C, ROWS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """`means, squares (parts, C)` of ROWS rows of `x (M, C)` each: the mean, and the sum of squared distances from it.

    A tile's are taken from its own mean and merged with those before (Chan, Golub and LeVeque 1983): a mean that is
    large beside the deviation costs no digits.
    """
    part, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, rows = channel < C, tl.minimum(ROWS, M - part * ROWS)
    x += part.to(tl.int64) * ROWS * C
    mean, square = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & exists[None, :]
        value = tl.load(x + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        before = tl.full((), start, tl.float32)
        count = tl.minimum(tl.full((), BLOCK_M, tl.float32), rows - before)
        own = tl.sum(value, 0) / count
        off = tl.where(inside, value - own[None, :], 0.0)
        distance = own - mean
        mean += distance * (count / (before + count))
        square += tl.sum(off * off, 0) + distance * distance * (before * count / (before + count))
    tl.store(means + part * C + channel, mean, mask=exists)
    tl.store(squares + part * C + channel, square, mask=exists)


@triton.jit
def sums(
    x, dy, mean, rstd, weight, bias, of_gradient, of_product, M, C, ROWS,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`of_gradient, of_product (parts, C)`: sums of g, the gradient before the activation, and of g times normal x."""
    part, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, rows = channel < C, tl.minimum(ROWS, M - part * ROWS)
    x += part.to(tl.int64) * ROWS * C
    dy += part.to(tl.int64) * ROWS * C
    deviation = tl.load(rstd + channel, mask=exists, other=0.0)[None, :]
    centre = tl.load(mean + channel, mask=exists, other=0.0)[None, :]
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    alone, product = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside, at = (row < rows)[:, None] & exists[None, :], row[:, None] * C + channel[None, :]
        normal = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre) * deviation
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope(normal * w + b, ACT)
        alone += tl.sum(g, 0)
        product += tl.sum(g * normal, 0)
    tl.store(of_gradient + part * C + channel, alone, mask=exists)
    tl.store(of_product + part * C + channel, product, mask=exists)
