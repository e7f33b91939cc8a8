"""A program owns a tile of keys and sees all queries of a window, in parts as in `rows`."""

# ruff: noqa: RUF005 - Triton knows no starred tuples

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
    unravel,
)  # fmt: skip


@triton.jit
def backward(
    qkv, bias, lse, seed, dout, dqkv, delta,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. All tiles are transposed, (keys, queries), so that the weights are at hand as the left factor."""
    N: tl.constexpr = P_H * P_W
    scale = in_fp32(scale)
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = N // BLOCK_N if REST > 0 else (N + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = FULL + 1 if REST > 0 else FULL
    groups_h, groups_w = tl.cdiv(H, P_H), tl.cdiv(W, P_W)
    tile, head, walker, walkers = share_of_work(TILES, heads)
    image, group_h, group_w = unravel(walker, groups_h, groups_w)
    by_image, by_h, by_w = unravel(walkers, groups_h, groups_w)

    key = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y_key, x_key = from_first(key, groups_h, groups_w, P_H, P_W, GRID)
    exists_key = key < N
    at_key = channels(y_key, x_key, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    at_grad = channels(y_key, x_key, 3 * W * heads * D, 3 * heads * D, BLOCK_D) + head * D
    biases = ()
    if HAS_BIAS:
        for part in tl.static_range(PARTS):
            query = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
            biases = biases + (tl.trans(bias_tile(bias, head, query, key, N)),)

    for step in range(tl.cdiv(B * groups_h * groups_w - walker, walkers)):
        window = walker + step * walkers
        first_y, first_x = first_token(group_h, group_w, groups_h, groups_w, P_H, P_W, GRID)
        first = qkv + (image.to(tl.int64) * stride_b + first_y * stride_h + first_x * stride_w)
        first_out = ((image.to(tl.int64) * H + first_y) * W + first_x) * (heads * D)
        if RAGGED:
            exists_key = (key < N) & (first_y + y_key < H) & (first_x + x_key < W)
        inside_key = exists_2d(exists_key, D, BLOCK_D)
        k = tl.load(first + stride_part + at_key, mask=inside_key, other=0.0)  # (BLOCK_M, D)
        v = tl.load(first + stride_part + stride_part + at_key, mask=inside_key, other=0.0)
        dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for part in tl.static_range(PARTS):
            query = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
            y, x = from_first(query, groups_h, groups_w, P_H, P_W, GRID)
            exists = query < N
            if RAGGED:
                exists = exists & (first_y + y < H) & (first_x + x < W)
            inside = exists_2d(exists, D, BLOCK_D)
            at = channels(y, x, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
            at_out = channels(y, x, W * heads * D, heads * D, BLOCK_D) + head * D
            at_lse = (window.to(tl.int64) * heads + head) * N + query
            q = tl.load(first + at, mask=inside, other=0.0)  # (queries, D)
            do = tl.load(dout + first_out + at_out, mask=inside, other=0.0)
            z = tl.load(lse + at_lse, mask=query < N, other=0.0)
            row = tl.load(delta + at_lse, mask=query < N, other=0.0)

            s = dot(k, tl.trans(q), PRECISION=PRECISION) * (scale * LOG2_E)  # (BLOCK_M, queries)
            if HAS_BIAS:
                s += biases[part]
            if RAGGED or not HAS_BIAS:
                s = tl.where(exists_key[:, None], s, -float("inf"))
            p = tl.exp2(s - z[None, :])
            dp = dot(v, tl.trans(do), PRECISION=PRECISION)
            kept = p
            if DROPOUT:
                factor = tl.trans(dropout_factor(tl.load(seed), window, head, heads, query, key, dropout_p, N))
                dp *= factor
                kept *= factor
            dv = dot(kept.to(do.dtype), do, dv, PRECISION=PRECISION)
            ds = p * (dp - row[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION=PRECISION)
        tl.store(dqkv + 3 * first_out + heads * D + at_grad, (dk * scale).to(k.dtype), mask=inside_key)
        tl.store(dqkv + 3 * first_out + 2 * heads * D + at_grad, dv.to(k.dtype), mask=inside_key)
        image, group_h, group_w = advance(image, group_h, group_w, by_image, by_h, by_w, groups_h, groups_w)
