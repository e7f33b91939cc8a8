"""The backward pass of small windows in one kernel: all tokens of a window are one tile.

Programs are counted so that the heads of one window run at the same time and share its cache lines.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn_triton.kernels.addressing import (
    LOG2_E,
    advance,
    bias_tile,
    channels,
    dot,
    dropout_factor,
    exists_2d,
    first_token,
    from_first,
    in_fp32,
    share_of_work,
    store_share,
    unravel,
)  # fmt: skip


@triton.jit
def backward(
    qkv, bias, lse, seed, dout, dqkv, dbias,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and v, written packed, and each program's share of the bias gradient, (walkers, h, N, N).

    The dot product of the output with its gradient, which a softmax's gradient needs, is summed from the weights:
    all are at hand, so the output is not read.
    """
    N: tl.constexpr = P_H * P_W
    scale = in_fp32(scale)
    groups_h, groups_w = tl.cdiv(H, P_H), tl.cdiv(W, P_W)
    _, head, walker, walkers = share_of_work(1, heads)
    image, group_h, group_w = unravel(walker, groups_h, groups_w)
    by_image, by_h, by_w = unravel(walkers, groups_h, groups_w)

    token = tl.arange(0, BLOCK_N)
    y, x = from_first(token, groups_h, groups_w, P_H, P_W, GRID)
    exists = token < N
    at = channels(y, x, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    at_out = channels(y, x, W * heads * D, heads * D, BLOCK_D) + head * D
    at_grad = channels(y, x, 3 * W * heads * D, 3 * heads * D, BLOCK_D) + head * D
    if HAS_BIAS:
        b = bias_tile(bias, head, token, token, N)  # (N, N)
    if BIAS_GRADIENT:
        db = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)

    for step in range(tl.cdiv(B * groups_h * groups_w - walker, walkers)):
        first_y, first_x = first_token(group_h, group_w, groups_h, groups_w, P_H, P_W, GRID)
        if RAGGED:
            exists = (token < N) & (first_y + y < H) & (first_x + x < W)
        inside = exists_2d(exists, D, BLOCK_D)
        first = qkv + (image.to(tl.int64) * stride_b + first_y * stride_h + first_x * stride_w)
        first_out = ((image.to(tl.int64) * H + first_y) * W + first_x) * (heads * D)
        window = walker + step * walkers
        q = tl.load(first + at, mask=inside, other=0.0)  # (N, D)
        k = tl.load(first + stride_part + at, mask=inside, other=0.0)
        v = tl.load(first + stride_part + stride_part + at, mask=inside, other=0.0)
        do = tl.load(dout + first_out + at_out, mask=inside, other=0.0)
        z = tl.load(lse + (window.to(tl.int64) * heads + head) * N + token, mask=token < N, other=0.0)

        s = dot(q, tl.trans(k), PRECISION=PRECISION) * (scale * LOG2_E)  # (N, N)
        if HAS_BIAS:
            s += b
        if RAGGED or not HAS_BIAS:
            s = tl.where(exists[None, :], s, -float("inf"))
        p = tl.exp2(s - z[:, None])
        dp = dot(do, tl.trans(v), PRECISION=PRECISION)
        kept = p
        if DROPOUT:
            factor = dropout_factor(tl.load(seed), window, head, heads, token, token, dropout_p, N)
            dp *= factor
            kept *= factor
        dv = dot(tl.trans(kept.to(do.dtype)), do, PRECISION=PRECISION)  # (N, D)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if BIAS_GRADIENT:
            db += ds
        ds = ds.to(q.dtype)
        dq = dot(ds, k, PRECISION=PRECISION) * scale
        dk = dot(tl.trans(ds), q, PRECISION=PRECISION) * scale

        first_grad = dqkv + 3 * first_out
        tl.store(first_grad + at_grad, dq.to(q.dtype), mask=inside)
        tl.store(first_grad + heads * D + at_grad, dk.to(q.dtype), mask=inside)
        tl.store(first_grad + 2 * heads * D + at_grad, dv.to(q.dtype), mask=inside)
        image, group_h, group_w = advance(image, group_h, group_w, by_image, by_h, by_w, groups_h, groups_w)

    if BIAS_GRADIENT:
        store_share(dbias, db, walker, head, heads, token, token, N)
