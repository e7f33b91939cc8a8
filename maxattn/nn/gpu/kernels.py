"""Batch norm over rows of channels, with the activation after it; forward and backward. In Triton.

Rows are pixels: `(M, C)` is a channels-last image or batch of them. What is summed over rows is summed in parts of as
many rows each, by one program and in a fixed order, so that results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of that name, of fp32. GELU with tanh is `x sigmoid(2 u)`: one exponential, no tanh."""
    if ACT == "gelu_tanh":
        x = x * sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # 2 sqrt(2 / pi)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "silu":
        x = x * sigmoid(x)
    elif ACT == "relu":
        x = tl.maximum(x, 0.0)
    elif ACT == "sigmoid":
        x = sigmoid(x)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of `activate`."""
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
def rounded(x, dtype: tl.constexpr):
    """fp32 in `dtype`. A GPU rounds to the nearest; the interpreter would cut bits of bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


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
def normalise(
    x, mean, rstd, weight, bias, out, M, C,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`out (M, C) = act((x - mean) rstd weight + bias)`."""
    at, inside, channel, exists = tile(M, C, BLOCK_M, BLOCK_C)
    _, z, _ = normal(x, at, inside, mean, rstd, weight, bias, channel, exists)
    tl.store(out + at, rounded(activate(z, ACT), out.dtype.element_ty), mask=inside)


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
    alone, product = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside, at = (row < rows)[:, None] & exists[None, :], row[:, None] * C + channel[None, :]
        _, z, value = normal(x, at, inside, mean, rstd, weight, bias, channel, exists)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope(z, ACT)
        alone += tl.sum(g, 0)
        product += tl.sum(g * value, 0)
    tl.store(of_gradient + part * C + channel, alone, mask=exists)
    tl.store(of_product + part * C + channel, product, mask=exists)


@triton.jit
def gradient(
    x, dy, mean, rstd, weight, bias, of_gradient, of_product, dx, M, C,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`dx (M, C) = weight rstd (g - (of_gradient + normal of_product) / M)`; the sums `(C)` are those over all rows."""
    at, inside, channel, exists = tile(M, C, BLOCK_M, BLOCK_C)
    scale, z, value = normal(x, at, inside, mean, rstd, weight, bias, channel, exists)
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope(z, ACT)
    alone = tl.load(of_gradient + channel, mask=exists, other=0.0)[None, :]
    product = tl.load(of_product + channel, mask=exists, other=0.0)[None, :]
    d = scale * (g - (alone + value * product) / M)
    tl.store(dx + at, rounded(d, dx.dtype.element_ty), mask=inside)


@triton.jit
def tile(M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where this program's tile is, what of it is inside, and its channels."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, exists = first + tl.arange(0, BLOCK_M), channel < C
    return row[:, None] * C + channel[None, :], (row < M)[:, None] & exists[None, :], channel, exists


@triton.jit
def normal(x, at, inside, mean, rstd, weight, bias, channel, exists):
    """weight rstd; what goes into the activation; and x less its mean, over its deviation."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    deviations = tl.load(rstd + channel, mask=exists, other=0.0)
    value = (value - tl.load(mean + channel, mask=exists, other=0.0)[None, :]) * deviations[None, :]
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return (w * deviations)[None, :], value * w[None, :] + b[None, :], value
