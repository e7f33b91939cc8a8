"""The sums over pixels of a batch norm with the activation after it, forward and backward. In Triton.

Rows are pixels: `(M, C)` is a channels-last batch of images. They are summed in parts of as many rows each, by one
program and in a fixed order, so that results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def before(dy, x, ACT: tl.constexpr):
    """The gradient before an activation of x, from `dy` after it; GELU with tanh is `x sigmoid(2 u)`."""
    if ACT == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        g = dy * (s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
    elif ACT == "gelu":
        g = dy * (0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACT == "silu":
        s = sigmoid(x)
        g = dy * (s + x * s * (1.0 - s))
    elif ACT == "relu":
        g = tl.where(x <= 0.0, 0.0, dy)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
        g = dy
    return g


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

    All is summed from the mean of the first tile on, so that a mean that is large beside the deviation costs no digits;
    in the dtype of x, else all distances of 16 bits would be rounded the same way.
    """
    part, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists, rows = channel < C, tl.minimum(ROWS, M - part * ROWS)
    x += part.to(tl.int64) * ROWS * C
    row = tl.arange(0, BLOCK_M)
    inside, at = (row < rows)[:, None] & exists[None, :], row[:, None] * C + channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    shift = (tl.sum(value, 0) / tl.minimum(rows, BLOCK_M)).to(x.dtype.element_ty).to(tl.float32)
    total, square = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_M):
        inside = (start + row < rows)[:, None] & exists[None, :]
        value = tl.load(x + start * C + at, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, value - shift[None, :], 0.0)
        total += distance
        square += distance * distance
    sums = tl.sum(total, 0)
    mean = sums / rows
    tl.store(means + part * C + channel, shift + mean, mask=exists)
    least = tl.maximum(tl.sum(square, 0) - sums * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(squares + part * C + channel, least, mask=exists)


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
    alone, product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    row = tl.arange(0, BLOCK_M)
    at = row[:, None] * C + channel[None, :]
    for start in range(0, rows, BLOCK_M):
        inside = (start + row < rows)[:, None] & exists[None, :]
        normal = (tl.load(x + start * C + at, mask=inside, other=0.0).to(tl.float32) - centre) * deviation
        g = before(tl.load(dy + start * C + at, mask=inside, other=0.0).to(tl.float32), normal * w + b, ACT)
        alone += g
        product += g * normal
    tl.store(of_gradient + part * C + channel, tl.sum(alone, 0), mask=exists)
    tl.store(of_product + part * C + channel, tl.sum(product, 0), mask=exists)
