"""A program owns a tile of queries and sees all keys of a window; it walks many windows with what does not change.

The keys come in parts: as many of BLOCK_N as fit, and a smaller rest, so that 144 keys are 64 + 64 + 16. The parts are
unrolled: where each lies, and its tile of the bias, is worked out once, before the first window.
"""

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
    store_share,
    unravel,
)  # fmt: skip


@triton.jit
def keys_and_values(
    first, key, head, first_y, first_x, H, W, groups_h, groups_w, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """k and v (keys, BLOCK_D) of a window whose first token lies at `first`, and which of the keys exist."""
    y, x = from_first(key, groups_h, groups_w, P_H, P_W, GRID)
    exists = key < P_H * P_W
    if RAGGED:
        exists = exists & (first_y + y < H) & (first_x + x < W)
    inside = exists_2d(exists, D, BLOCK_D)
    at = channels(y, x, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    k = tl.load(first + stride_part + at, mask=inside, other=0.0)
    return k, tl.load(first + stride_part + stride_part + at, mask=inside, other=0.0), exists


@triton.jit
def forward(
    qkv, bias, out, lse, seed,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, SAVE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + bias) v of every window, and the base-2 log-sum-exp of each query's logits."""
    N: tl.constexpr = P_H * P_W
    scale = in_fp32(scale)
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = N // BLOCK_N if REST > 0 else (N + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = FULL + 1 if REST > 0 else FULL
    groups_h, groups_w = tl.cdiv(H, P_H), tl.cdiv(W, P_W)
    tile, head, walker, walkers = share_of_work(TILES, heads)
    image, group_h, group_w = unravel(walker, groups_h, groups_w)
    by_image, by_h, by_w = unravel(walkers, groups_h, groups_w)

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x = from_first(query, groups_h, groups_w, P_H, P_W, GRID)
    exists = query < N
    at = channels(y, x, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    at_out = channels(y, x, W * heads * D, heads * D, BLOCK_D) + head * D
    biases = ()
    if HAS_BIAS:
        for part in tl.static_range(PARTS):
            key = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
            biases = biases + (bias_tile(bias, head, query, key, N),)

    for step in range(tl.cdiv(B * groups_h * groups_w - walker, walkers)):
        window = walker + step * walkers
        first_y, first_x = first_token(group_h, group_w, groups_h, groups_w, P_H, P_W, GRID)
        first = qkv + (image.to(tl.int64) * stride_b + first_y * stride_h + first_x * stride_w)
        if RAGGED:
            exists = (query < N) & (first_y + y < H) & (first_x + x < W)
        inside = exists_2d(exists, D, BLOCK_D)
        q = tl.load(first + at, mask=inside, other=0.0)  # (BLOCK_M, D)
        m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for part in tl.static_range(PARTS):
            key = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
            k, v, exists_key = keys_and_values(
                first, key, head, first_y, first_x, H, W, groups_h, groups_w,
                stride_h, stride_w, stride_part, stride_head, GRID, P_H, P_W, D, RAGGED, BLOCK_D,
            )  # fmt: skip
            s = dot(q, tl.trans(k), PRECISION=PRECISION) * (scale * LOG2_E)  # (BLOCK_M, keys)
            if HAS_BIAS:
                s += biases[part]
            if RAGGED or not HAS_BIAS:
                s = tl.where(exists_key[None, :], s, -float("inf"))
            if part == 0:
                m = tl.max(s, 1)
                base = tl.where(m == -float("inf"), 0.0, m) if PARTS > 1 else m  # all keys of a part may be masked
                p = tl.exp2(s - base[:, None])
                total = tl.sum(p, 1)
            else:
                larger = tl.maximum(m, tl.max(s, 1))
                base = tl.where(larger == -float("inf"), 0.0, larger)
                p = tl.exp2(s - base[:, None])
                shrink = tl.exp2(m - base)
                total = total * shrink + tl.sum(p, 1)
                o *= shrink[:, None]
                m = larger
            if DROPOUT:
                p *= dropout_factor(tl.load(seed), window, head, heads, query, key, dropout_p, N)
            o = dot(p.to(v.dtype), v, o, PRECISION=PRECISION)

        first_out = out + ((image.to(tl.int64) * H + first_y) * W + first_x) * (heads * D)
        o *= (1.0 / total)[:, None]
        tl.store(first_out + at_out, o.to(out.dtype.element_ty), mask=inside)
        if SAVE_LSE:
            tl.store(lse + (window.to(tl.int64) * heads + head) * N + query, m + tl.log2(total), mask=query < N)
        image, group_h, group_w = advance(image, group_h, group_w, by_image, by_h, by_w, groups_h, groups_w)


@triton.jit
def backward(
    qkv, bias, out, lse, seed, dout, dqkv, delta, dbias,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, delta (each query's dot product of the output with its gradient), and a share of the bias gradient."""
    N: tl.constexpr = P_H * P_W
    scale = in_fp32(scale)
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = N // BLOCK_N if REST > 0 else (N + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = FULL + 1 if REST > 0 else FULL
    groups_h, groups_w = tl.cdiv(H, P_H), tl.cdiv(W, P_W)
    tile, head, walker, walkers = share_of_work(TILES, heads)
    image, group_h, group_w = unravel(walker, groups_h, groups_w)
    by_image, by_h, by_w = unravel(walkers, groups_h, groups_w)

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x = from_first(query, groups_h, groups_w, P_H, P_W, GRID)
    exists = query < N
    at = channels(y, x, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    at_out = channels(y, x, W * heads * D, heads * D, BLOCK_D) + head * D
    at_grad = channels(y, x, 3 * W * heads * D, 3 * heads * D, BLOCK_D) + head * D
    biases = ()
    shares = ()
    for part in tl.static_range(PARTS):
        key = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
        if HAS_BIAS:
            biases = biases + (bias_tile(bias, head, query, key, N),)
        if BIAS_GRADIENT:
            shares = shares + (tl.zeros((BLOCK_M, BLOCK_N if part < FULL else REST), tl.float32),)

    for step in range(tl.cdiv(B * groups_h * groups_w - walker, walkers)):
        window = walker + step * walkers
        first_y, first_x = first_token(group_h, group_w, groups_h, groups_w, P_H, P_W, GRID)
        first = qkv + (image.to(tl.int64) * stride_b + first_y * stride_h + first_x * stride_w)
        first_out = ((image.to(tl.int64) * H + first_y) * W + first_x) * (heads * D)
        if RAGGED:
            exists = (query < N) & (first_y + y < H) & (first_x + x < W)
        inside = exists_2d(exists, D, BLOCK_D)
        at_lse = (window.to(tl.int64) * heads + head) * N + query
        q = tl.load(first + at, mask=inside, other=0.0)  # (BLOCK_M, D)
        do = tl.load(dout + first_out + at_out, mask=inside, other=0.0)
        o = tl.load(out + first_out + at_out, mask=inside, other=0.0)
        z = tl.load(lse + at_lse, mask=query < N, other=0.0)
        row = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + at_lse, row, mask=query < N)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        summed = ()
        for part in tl.static_range(PARTS):
            key = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
            k, v, exists_key = keys_and_values(
                first, key, head, first_y, first_x, H, W, groups_h, groups_w,
                stride_h, stride_w, stride_part, stride_head, GRID, P_H, P_W, D, RAGGED, BLOCK_D,
            )  # fmt: skip
            s = dot(q, tl.trans(k), PRECISION=PRECISION) * (scale * LOG2_E)  # (BLOCK_M, keys)
            if HAS_BIAS:
                s += biases[part]
            if RAGGED or not HAS_BIAS:
                s = tl.where(exists_key[None, :], s, -float("inf"))
            p = tl.exp2(s - z[:, None])
            dp = dot(do, tl.trans(v), PRECISION=PRECISION)
            if DROPOUT:
                dp *= dropout_factor(tl.load(seed), window, head, heads, query, key, dropout_p, N)
            ds = p * (dp - row[:, None])
            if BIAS_GRADIENT:
                summed = summed + (shares[part] + ds,)
            dq = dot(ds.to(k.dtype), k, dq, PRECISION=PRECISION)
        shares = summed
        tl.store(dqkv + 3 * first_out + at_grad, (dq * scale).to(q.dtype), mask=inside)
        image, group_h, group_w = advance(image, group_h, group_w, by_image, by_h, by_w, groups_h, groups_w)

    if BIAS_GRADIENT:
        for part in tl.static_range(PARTS):
            key = part * BLOCK_N + tl.arange(0, BLOCK_N if part < FULL else REST)
            store_share(dbias, shares[part], walker, head, heads, query, key, N)
