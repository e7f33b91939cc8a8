"""A norm over the channels, without weights, as a pass of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.inference.gpu.kernels.common import normed
from maxattn.nn.gpu.arithmetic import rounded


@triton.jit
def norm(
    x, out,
    M, C, eps,
    NORM: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`out (M, C) = norm(x (M, C))`; a program holds BLOCK_M rows."""
    first = (tl.program_id(0) * BLOCK_M).to(tl.int64)
    rows = M - tl.program_id(0) * BLOCK_M  # from here on; may be fewer than the tile has
    row, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    known = (c < C) | EVEN_C
    at = first * C + row[:, None] * C + c[None, :]
    inside = (row < rows)[:, None] & known[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(normed(value, known, C, eps, NORM), out.dtype.element_ty), mask=inside)
