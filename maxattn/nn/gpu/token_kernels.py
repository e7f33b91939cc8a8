"""The backward pass of what stands before a Linear, with its output again for the Linear's gradient. In Triton.

Rows are pixels: `(M, C)` is NHWC. Sums over them are of parts of as many rows each, by one program and in a fixed
order, so that results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.nn.gpu.arithmetic import activate, before, rounded


@triton.jit
def layer_norm_backward(
    dy, skip, x, weight, bias, dx, y, of_both, eps, parts, M, C, ROWS,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dx (M, C)` from dy after the norm of x and from `skip`, which reaches x directly; with it y, that norm.

    `of_both (2, parts, C)`: sums of the gradients of weight and bias.
    """
    part, channel, row = tl.program_id(0), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_M)
    exists, rows = channel < C, tl.minimum(ROWS, M - part * ROWS)
    first = part.to(tl.int64) * ROWS * C
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    eps = tl.full((), eps, tl.float32)  # a compiler passes Python's floats in fp64
    count = tl.full((), C, tl.float32)
    share = tl.div_rn(tl.full((), 1.0, tl.float32), count)
    of_weight, of_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        inside = (start + row < rows)[:, None] & exists[None, :]
        at = first + start * C + row[:, None] * C + channel[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        direct = tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(value, 1), count)
        distance = tl.where(exists[None, :], value - mean[:, None], 0.0)
        deviation = tl.rsqrt(tl.sum(distance * distance, 1) * share + eps)[:, None]
        normal = distance * deviation
        tl.store(y + at, rounded(normal * w + b, y.dtype.element_ty), mask=inside)
        of_weight += tl.where(inside, g * normal, 0.0)  # beyond the last row a norm may be no number
        of_bias += g
        g = g * w
        along = (tl.sum(g * normal, 1) * share)[:, None]
        alone = (tl.sum(g, 1) * share)[:, None]
        through = deviation * (g - alone - normal * along)
        tl.store(dx + at, rounded(direct + through, dx.dtype.element_ty), mask=inside)
    to = part * C + channel
    tl.store(of_both + to, tl.sum(of_weight, 0), mask=exists)
    tl.store(of_both + parts * C + to, tl.sum(of_bias, 0), mask=exists)


@triton.jit
def activation_backward(
    dy, x, bias, dx, y, of_bias, M, C, ROWS,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dx (M, C)` from dy after the activation of `x + bias`; with it y, that activation.

    `of_bias (parts, C)`: sums of dx.
    """
    part, channel, row = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_M)
    exists, rows = channel < C, tl.minimum(ROWS, M - part * ROWS)
    first = part.to(tl.int64) * ROWS * C
    b = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        inside = (start + row < rows)[:, None] & exists[None, :]
        at = first + start * C + row[:, None] * C + channel[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + b
        g = before(tl.load(dy + at, mask=inside, other=0.0).to(tl.float32), z, ACT)
        tl.store(y + at, rounded(activate(z, ACT), y.dtype.element_ty), mask=inside)
        tl.store(dx + at, rounded(g, dx.dtype.element_ty), mask=inside)
        total += g
    tl.store(of_bias + part * C + channel, tl.sum(total, 0), mask=exists)
