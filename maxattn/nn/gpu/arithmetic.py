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
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "sigmoid":
        x = sigmoid(x)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return x


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
