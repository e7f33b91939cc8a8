"""What the kernels share: norms, and the matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.nn.gpu.arithmetic import INTERPRETED, rounded


@triton.jit
def normed(value, known, C, eps, NORM: tl.constexpr):
    """The norm of rows `value (BLOCK_M, BLOCK_C)`, of fp32, over the C channels that are `known`; others are zeros.

    The mean's division is rounded correctly: a unit of a large mean is much to a small deviation.
    """
    if NORM == "layer_norm":
        mean = tl.div_rn(tl.sum(value, 1), tl.full((), C, tl.float32))
        value = tl.where(known[None, :], value - mean[:, None], 0.0)
    else:
        tl.static_assert(NORM == "rms_norm", "unknown norm")
    eps = tl.full((), eps, tl.float32)  # a compiler passes Python's floats in fp64
    return value * tl.rsqrt(tl.sum(value * value, 1) / C + eps)[:, None]


@triton.jit
def dot(a, b, acc):
    """a b + acc, summed in fp32. The interpreter takes bfloat16 for integers, so there the operands are widened."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def gated(a, gate):
    """a times gate, both of one dtype. The interpreter has no products of bfloat16."""
    return rounded(a.to(tl.float32) * gate.to(tl.float32), a.dtype) if INTERPRETED else a * gate


@triton.jit
def tile_of(columns, BLOCK_N: tl.constexpr):
    """The tile's row and column of this program. Tiles of the same rows run one after another and share their cache."""
    across = tl.cdiv(columns, BLOCK_N)
    return tl.program_id(0) // across, tl.program_id(0) % across
