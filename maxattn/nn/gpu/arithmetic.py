"""What kernels here and those for inference share. In Triton."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


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
