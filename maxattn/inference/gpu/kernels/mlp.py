"""A whole MLP of few channels: norm, Linear, activation, Linear, residual. What is hidden never leaves the chip."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.inference.gpu.kernels.common import dot, normed
from maxattn.nn.gpu.arithmetic import activate, rounded


@triton.jit
def mlp(
    x, weight1, bias1, weight2, bias2, out,
    M, C, hidden, eps,
    ACT: tl.constexpr, NORM: tl.constexpr, BIASED_1: tl.constexpr, BIASED_2: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`out (M, C) = x + act(norm(x) weight1 (hidden, C)^T + bias1) weight2 (C, hidden)^T + bias2`.

    A program holds all channels of BLOCK_M rows, and goes over BLOCK_H hidden ones at a time.
    """
    first = (tl.program_id(0) * BLOCK_M).to(tl.int64)
    rows = M - tl.program_id(0) * BLOCK_M  # from here on; may be fewer than the tile has
    row, c, h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    known = (c < C) | EVEN_C
    x += first * C
    at = tl.minimum(row, rows - 1)[:, None] * C + c[None, :]  # a row read twice needs no mask
    a = tl.load(x + at, mask=known[None, :], other=0.0)
    if NORM != "none":
        a = rounded(normed(a.to(tl.float32), known, C, eps, NORM), x.dtype.element_ty)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        inside = (start + h < hidden) | EVEN_H
        w1_at = (start + h)[:, None] * C + c[None, :]
        w1 = tl.load(weight1 + w1_at, mask=inside[:, None] & known[None, :], other=0.0)
        w2_at = c[:, None] * hidden + (start + h)[None, :]
        w2 = tl.load(weight2 + w2_at, mask=inside[None, :] & known[:, None], other=0.0)
        z = dot(a, tl.trans(w1), tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
        if BIASED_1:
            z += tl.load(bias1 + start + h, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc = dot(rounded(activate(z, ACT), x.dtype.element_ty), tl.trans(w2), acc)

    if BIASED_2:
        acc += tl.load(bias2 + c, mask=known, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(x + at, mask=known[None, :], other=0.0).to(tl.float32)
    written = (row < rows)[:, None] & known[None, :]
    tl.store(out + first * C + at, rounded(acc, out.dtype.element_ty), mask=written)
