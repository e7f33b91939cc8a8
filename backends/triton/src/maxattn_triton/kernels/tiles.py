"""Large windows: a loop over tiles of BLOCK_M queries by BLOCK_N keys, as in flash attention.

Three kernels make the backward pass, each the owner of what it sums: `backward_queries` of dq, `backward_keys` of dk
and dv, `backward_bias` of a tile of the bias gradient. The bias comes prepared, (h, NP, NP): to base 2 and padded to a
multiple of every tile with -inf for keys and 0 for queries, so that its tiles are loaded without a mask. `forward` and
`backward_queries` take SHARING windows side by side, so that each tile of the bias that is loaded serves them all, and
one window's products run while another's exponentials do.
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from maxattn_triton.kernels.addressing import (
    LOG2_E,
    advance,
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
def locate(window, H, W, P_H: tl.constexpr, P_W: tl.constexpr, GRID: tl.constexpr):
    """The image of a window, and the row and column of its first token."""
    groups_h, groups_w = tl.cdiv(H, P_H), tl.cdiv(W, P_W)
    image, group_h, group_w = unravel(window, groups_h, groups_w)
    first_y, first_x = first_token(group_h, group_w, groups_h, groups_w, P_H, P_W, GRID)
    return image.to(tl.int64), first_y, first_x


@triton.jit
def locate_if(window, windows, H, W, P_H: tl.constexpr, P_W: tl.constexpr, GRID: tl.constexpr):
    """The same of a window that may be past the last: then its tokens lie below the image, where there are none."""
    image, first_y, first_x = locate(window, H, W, P_H, P_W, GRID)
    return image, tl.where(window < windows, first_y, H), first_x


@triton.jit
def place(token, first_y, first_x, H, W, P_H: tl.constexpr, P_W: tl.constexpr, GRID: tl.constexpr):
    """Rows and columns of tokens from the first of their window, and whether they exist."""
    y, x = from_first(token, tl.cdiv(H, P_H), tl.cdiv(W, P_W), P_H, P_W, GRID)
    return y, x, (token < P_H * P_W) & (first_y + y < H) & (first_x + x < W)


@triton.jit
def keys_and_values(
    first, key, first_y, first_x, H, W, stride_h, stride_w, stride_part,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """k and v (BLOCK_N, BLOCK_D) of a window whose first token lies at `first`, and which of the keys exist."""
    y, x, exists = place(key, first_y, first_x, H, W, P_H, P_W, GRID)
    inside = exists_2d(exists, D, BLOCK_D)
    at = first + stride_part + channels(y, x, stride_h, stride_w, BLOCK_D)
    k = tl.load(at, mask=inside, other=0.0)
    return k, tl.load(at + stride_part, mask=inside, other=0.0), exists


@triton.jit
def bias_of(bias, query, key, NP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A tile (BLOCK_M, BLOCK_N) of a head's prepared bias."""
    tile = 0.0
    if HAS_BIAS:
        tile = tl.load(bias + (query[:, None] * NP + key[None, :]))
    return tile


@triton.jit
def products(q, k, exists_key, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """The logits of a tile of queries and keys but for the bias, to base 2; -inf for keys that do not exist."""
    s = dot(q, tl.trans(k), PRECISION=PRECISION) * (scale * LOG2_E)  # (BLOCK_M, BLOCK_N)
    if MASKED:
        s = tl.where(exists_key[None, :], s, -float("inf"))
    return s


@triton.jit
def forward(
    qkv, bias, out, lse, seed,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr, SAVE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SHARING: tl.constexpr,
    NP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T + bias) v for a tile of queries, and the base-2 log-sum-exp of each one's logits."""
    N: tl.constexpr = P_H * P_W
    MASKED: tl.constexpr = RAGGED or not HAS_BIAS
    scale = in_fp32(scale)
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    windows = B * tl.cdiv(H, P_H) * tl.cdiv(W, P_W)
    tile, head, walker, walkers = share_of_work(TILES, heads)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qkv += head.to(tl.int64) * stride_head
    bias += head.to(tl.int64) * NP * NP

    for step in range(tl.cdiv(tl.cdiv(windows, SHARING) - walker, walkers)):
        first_window = (walker + step * walkers) * SHARING
        corners, qs, ms, totals, os = (), (), (), (), ()
        for i in tl.static_range(SHARING):
            image, first_y, first_x = locate_if(first_window + i, windows, H, W, P_H, P_W, GRID)
            first = qkv + (image * stride_b + first_y * stride_h + first_x * stride_w)
            y, x, exists = place(query, first_y, first_x, H, W, P_H, P_W, GRID)
            inside = exists_2d(exists, D, BLOCK_D)
            q = tl.load(first + channels(y, x, stride_h, stride_w, BLOCK_D), mask=inside, other=0.0)  # (BLOCK_M, D)
            corners = corners + ((first, first_y, first_x),)
            qs = qs + (q,)
            ms = ms + (tl.full((BLOCK_M,), -float("inf"), tl.float32),)
            totals = totals + (tl.zeros((BLOCK_M,), tl.float32),)
            os = os + (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)
        for start in range(0, N, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            b = bias_of(bias, query, key, NP, HAS_BIAS)
            new_ms, new_totals, new_os = (), (), ()
            for i in tl.static_range(SHARING):
                first, first_y, first_x = corners[i]
                k, v, exists_key = keys_and_values(
                    first, key, first_y, first_x, H, W, stride_h, stride_w, stride_part, GRID, P_H, P_W, D, BLOCK_D
                )
                s = products(qs[i], k, exists_key, scale, MASKED, PRECISION) + b
                m = tl.maximum(ms[i], tl.max(s, 1))
                base = tl.where(m == -float("inf"), 0.0, m)  # no key of this tile or of earlier ones exists
                p = tl.exp2(s - base[:, None])
                shrink = tl.exp2(ms[i] - base)
                new_totals = new_totals + (totals[i] * shrink + tl.sum(p, 1),)
                if DROPOUT:
                    p *= dropout_factor(tl.load(seed), first_window + i, head, heads, query, key, dropout_p, N)
                new_os = new_os + (dot(p.to(v.dtype), v, os[i] * shrink[:, None], PRECISION=PRECISION),)
                new_ms = new_ms + (m,)
            ms, totals, os = new_ms, new_totals, new_os
        for i in tl.static_range(SHARING):
            window = first_window + i
            image, first_y, first_x = locate_if(window, windows, H, W, P_H, P_W, GRID)
            y, x, exists = place(query, first_y, first_x, H, W, P_H, P_W, GRID)
            at_out = ((image * H + first_y) * W + first_x) * (heads * D) + head * D
            at_out += channels(y, x, W * heads * D, heads * D, BLOCK_D)
            o = os[i] * (1.0 / totals[i])[:, None]
            tl.store(out + at_out, o.to(out.dtype.element_ty), mask=exists_2d(exists, D, BLOCK_D))
            if SAVE_LSE:
                at_lse = (window.to(tl.int64) * heads + head) * N + query
                tl.store(lse + at_lse, ms[i] + tl.log2(totals[i]), mask=query < tl.where(window < windows, N, 0))


@triton.jit
def backward_queries(
    qkv, bias, out, lse, seed, dout, dqkv, delta,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SHARING: tl.constexpr,
    NP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, and delta, each query's dot product of the output with its gradient."""
    N: tl.constexpr = P_H * P_W
    MASKED: tl.constexpr = RAGGED or not HAS_BIAS
    scale = in_fp32(scale)
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    windows = B * tl.cdiv(H, P_H) * tl.cdiv(W, P_W)
    tile, head, walker, walkers = share_of_work(TILES, heads)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qkv += head.to(tl.int64) * stride_head
    bias += head.to(tl.int64) * NP * NP

    for step in range(tl.cdiv(tl.cdiv(windows, SHARING) - walker, walkers)):
        first_window = (walker + step * walkers) * SHARING
        corners, qs, dos, zs, deltas, dqs = (), (), (), (), (), ()
        for i in tl.static_range(SHARING):
            window = first_window + i
            image, first_y, first_x = locate_if(window, windows, H, W, P_H, P_W, GRID)
            first = qkv + (image * stride_b + first_y * stride_h + first_x * stride_w)
            y, x, exists = place(query, first_y, first_x, H, W, P_H, P_W, GRID)
            inside = exists_2d(exists, D, BLOCK_D)
            at_out = ((image * H + first_y) * W + first_x) * (heads * D) + head * D
            at_out += channels(y, x, W * heads * D, heads * D, BLOCK_D)
            at_lse = (window.to(tl.int64) * heads + head) * N + query
            has_lse = query < tl.where(window < windows, N, 0)
            q = tl.load(first + channels(y, x, stride_h, stride_w, BLOCK_D), mask=inside, other=0.0)  # (BLOCK_M, D)
            do = tl.load(dout + at_out, mask=inside, other=0.0)
            o = tl.load(out + at_out, mask=inside, other=0.0)
            row = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            tl.store(delta + at_lse, row, mask=has_lse)
            corners = corners + ((first, first_y, first_x),)
            qs = qs + (q,)
            dos = dos + (do,)
            zs = zs + (tl.load(lse + at_lse, mask=has_lse, other=0.0),)
            deltas = deltas + (row,)
            dqs = dqs + (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)
        for start in range(0, N, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            b = bias_of(bias, query, key, NP, HAS_BIAS)
            new_dqs = ()
            for i in tl.static_range(SHARING):
                first, first_y, first_x = corners[i]
                k, v, exists_key = keys_and_values(
                    first, key, first_y, first_x, H, W, stride_h, stride_w, stride_part, GRID, P_H, P_W, D, BLOCK_D
                )
                s = products(qs[i], k, exists_key, scale, MASKED, PRECISION) + b
                p = tl.exp2(s - zs[i][:, None])
                dp = dot(dos[i], tl.trans(v), PRECISION=PRECISION)
                if DROPOUT:
                    dp *= dropout_factor(tl.load(seed), first_window + i, head, heads, query, key, dropout_p, N)
                ds = p * (dp - deltas[i][:, None])
                new_dqs = new_dqs + (dot(ds.to(k.dtype), k, dqs[i], PRECISION=PRECISION),)
            dqs = new_dqs
        for i in tl.static_range(SHARING):
            image, first_y, first_x = locate_if(first_window + i, windows, H, W, P_H, P_W, GRID)
            y, x, exists = place(query, first_y, first_x, H, W, P_H, P_W, GRID)
            at_grad = 3 * ((image * H + first_y) * W + first_x) * (heads * D) + head * D
            at_grad += channels(y, x, 3 * W * heads * D, 3 * heads * D, BLOCK_D)
            tl.store(dqkv + at_grad, (dqs[i] * scale).to(qkv.dtype.element_ty), mask=exists_2d(exists, D, BLOCK_D))


@triton.jit
def backward_keys(
    qkv, bias, lse, seed, dout, dqkv, delta,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys."""
    N: tl.constexpr = P_H * P_W
    MASKED: tl.constexpr = RAGGED or not HAS_BIAS
    scale = in_fp32(scale)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, head, walker, walkers = share_of_work(TILES, heads)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    qkv += head.to(tl.int64) * stride_head
    dqkv += head * D
    bias += head.to(tl.int64) * NP * NP

    for step in range(tl.cdiv(B * tl.cdiv(H, P_H) * tl.cdiv(W, P_W) - walker, walkers)):
        window = walker + step * walkers
        image, first_y, first_x = locate(window, H, W, P_H, P_W, GRID)
        first = qkv + (image * stride_b + first_y * stride_h + first_x * stride_w)
        first_out = ((image * H + first_y) * W + first_x) * (heads * D)
        k, v, exists_key = keys_and_values(
            first, key, first_y, first_x, H, W, stride_h, stride_w, stride_part, GRID, P_H, P_W, D, BLOCK_D
        )
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, N, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            y, x, exists = place(query, first_y, first_x, H, W, P_H, P_W, GRID)
            inside = exists_2d(exists, D, BLOCK_D)
            at_out = first_out + head * D + channels(y, x, W * heads * D, heads * D, BLOCK_D)
            at_lse = (window.to(tl.int64) * heads + head) * N + query
            q = tl.load(first + channels(y, x, stride_h, stride_w, BLOCK_D), mask=inside, other=0.0)  # (BLOCK_M, D)
            do = tl.load(dout + at_out, mask=inside, other=0.0)
            z = tl.load(lse + at_lse, mask=query < N, other=0.0)
            row = tl.load(delta + at_lse, mask=query < N, other=0.0)
            s = products(q, k, exists_key, scale, MASKED, PRECISION) + bias_of(bias, query, key, NP, HAS_BIAS)
            p = tl.exp2(s - z[:, None])
            dp = dot(do, tl.trans(v), PRECISION=PRECISION)
            kept = p
            if DROPOUT:
                factor = dropout_factor(tl.load(seed), window, head, heads, query, key, dropout_p, N)
                dp *= factor
                kept *= factor
            dv = dot(tl.trans(kept.to(do.dtype)), do, dv, PRECISION=PRECISION)
            ds = p * (dp - row[:, None])
            dk = dot(tl.trans(ds.to(q.dtype)), q, dk, PRECISION=PRECISION)
        y_key, x_key, exists_key = place(key, first_y, first_x, H, W, P_H, P_W, GRID)
        inside_key = exists_2d(exists_key, D, BLOCK_D)
        at_grad = 3 * first_out + channels(y_key, x_key, 3 * W * heads * D, 3 * heads * D, BLOCK_D)
        tl.store(dqkv + heads * D + at_grad, (dk * scale).to(k.dtype), mask=inside_key)
        tl.store(dqkv + 2 * heads * D + at_grad, dv.to(k.dtype), mask=inside_key)


@triton.jit
def backward_bias(
    qkv, bias, lse, seed, dout, delta, dbias,
    scale, dropout_p,
    B, H, W, heads, stride_b, stride_h, stride_w, stride_part, stride_head,
    GRID: tl.constexpr, P_H: tl.constexpr, P_W: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program's share of one tile of the bias gradient, (walkers, h, N, N)."""
    N: tl.constexpr = P_H * P_W
    scale = in_fp32(scale)
    TILES_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    groups_h, groups_w = tl.cdiv(H, P_H), tl.cdiv(W, P_W)
    tile, head, walker, walkers = share_of_work(TILES_M * TILES_N, heads)
    query = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    image, group_h, group_w = unravel(walker, groups_h, groups_w)
    by_image, by_h, by_w = unravel(walkers, groups_h, groups_w)

    y, x = from_first(query, groups_h, groups_w, P_H, P_W, GRID)
    y_key, x_key = from_first(key, groups_h, groups_w, P_H, P_W, GRID)
    exists = query < N
    exists_key = key < N
    at = channels(y, x, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    at_key = channels(y_key, x_key, stride_h, stride_w, BLOCK_D) + head.to(tl.int64) * stride_head
    at_out = channels(y, x, W * heads * D, heads * D, BLOCK_D) + head * D
    b = tl.load(bias + head.to(tl.int64) * NP * NP + (query[:, None] * NP + key[None, :]))  # (BLOCK_M, BLOCK_N)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for step in range(tl.cdiv(B * groups_h * groups_w - walker, walkers)):
        window = walker + step * walkers
        first_y, first_x = first_token(group_h, group_w, groups_h, groups_w, P_H, P_W, GRID)
        first = qkv + (image.to(tl.int64) * stride_b + first_y * stride_h + first_x * stride_w)
        first_out = ((image.to(tl.int64) * H + first_y) * W + first_x) * (heads * D)
        if RAGGED:
            exists = (query < N) & (first_y + y < H) & (first_x + x < W)
            exists_key = (key < N) & (first_y + y_key < H) & (first_x + x_key < W)
        inside = exists_2d(exists, D, BLOCK_D)
        inside_key = exists_2d(exists_key, D, BLOCK_D)
        at_lse = (window.to(tl.int64) * heads + head) * N + query
        q = tl.load(first + at, mask=inside, other=0.0)  # (BLOCK_M, D)
        k = tl.load(first + stride_part + at_key, mask=inside_key, other=0.0)  # (BLOCK_N, D)
        v = tl.load(first + stride_part + stride_part + at_key, mask=inside_key, other=0.0)
        do = tl.load(dout + first_out + at_out, mask=inside, other=0.0)
        z = tl.load(lse + at_lse, mask=query < N, other=0.0)
        row = tl.load(delta + at_lse, mask=query < N, other=0.0)
        s = dot(q, tl.trans(k), PRECISION=PRECISION) * (scale * LOG2_E) + b
        if RAGGED:
            s = tl.where(exists_key[None, :], s, -float("inf"))
        p = tl.exp2(s - z[:, None])
        dp = dot(do, tl.trans(v), PRECISION=PRECISION)
        if DROPOUT:
            dp *= dropout_factor(tl.load(seed), window, head, heads, query, key, dropout_p, N)
        db += p * (dp - row[:, None])
        image, group_h, group_w = advance(image, group_h, group_w, by_image, by_h, by_w, groups_h, groups_w)

    store_share(dbias, db, walker, head, heads, query, key, N)
