"""A Linear of few channels, with the norm before it: a program holds whole rows, and reads them once."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.inference.gpu.kernels.common import dot, normed
from maxattn.nn.gpu.arithmetic import activate, rounded


@triton.jit
def narrow(
    x, weight, bias, out,
    M, C, N, eps,
    ACT: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out (M, N) = act(norm(x (M, C)) weight (N, C)^T + bias)`.

    A program holds all channels of BLOCK_M rows, and goes over BLOCK_N outputs at a time.
    """
    first = (tl.program_id(0) * BLOCK_M).to(tl.int64)
    rows = M - tl.program_id(0) * BLOCK_M  # from here on; may be fewer than the tile has
    row, c, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    known = (c < C) | EVEN_C
    x += first * C
    at = tl.minimum(row, rows - 1)[:, None] * C + c[None, :]  # a row read twice needs no mask
    a = tl.load(x + at, mask=known[None, :], other=0.0)
    if NORM != "none":
        a = rounded(normed(a.to(tl.float32), known, C, eps, NORM), x.dtype.element_ty)
    out += first * N
    for start in range(0, N, BLOCK_N):
        inside = (start + n < N) | EVEN_N
        w_at = (start + n)[:, None] * C + c[None, :]
        w = tl.load(weight + w_at, mask=inside[:, None] & known[None, :], other=0.0)
        y = dot(a, tl.trans(w), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if BIASED:
            y += tl.load(bias + start + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        written = (row < rows)[:, None] & inside[None, :]
        y_at = row[:, None] * N + (start + n)[None, :]
        tl.store(out + y_at, rounded(activate(y, ACT), out.dtype.element_ty), mask=written)
