"""What the kernels share: where the tokens of a window lie in the image, the bias, dropout, the matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def pixel(group, token, groups, WINDOW: tl.constexpr, GRID: tl.constexpr):
    """The index map along one side of the image (MaxViT paper, section 3.2)."""
    return token * groups + group if GRID else group * WINDOW + token


@triton.jit
def share_of_work(TILES: tl.constexpr, heads):
    """What a program owns: its tile and head, and which of how many walkers it is: one takes every so many windows."""
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % heads
    walker, walkers = tl.program_id(0) // (TILES * heads), tl.num_programs(0) // (TILES * heads)
    return tile, head, walker, walkers


@triton.jit
def unravel(window, groups_h, groups_w):
    """The image of a window and its group along the height and the width, in the order in which windows are counted."""
    return window // (groups_h * groups_w), window // groups_w % groups_h, window % groups_w


@triton.jit
def advance(image, group_h, group_w, by_image, by_h, by_w, groups_h, groups_w):
    """The window that many windows later: a sum of unravelled counts with carries, which costs less than divisions."""
    group_w += by_w
    carry = (group_w >= groups_w).to(tl.int32)
    group_w -= carry * groups_w
    group_h += by_h + carry
    carry = (group_h >= groups_h).to(tl.int32)
    return image + by_image + carry, group_h - carry * groups_h, group_w


@triton.jit
def first_token(group_h, group_w, groups_h, groups_w, P_H: tl.constexpr, P_W: tl.constexpr, GRID: tl.constexpr):
    """Row and column of the first token of a window."""
    first_y = pixel(group_h.to(tl.int64), 0, groups_h, P_H, GRID)
    return first_y, pixel(group_w.to(tl.int64), 0, groups_w, P_W, GRID)


@triton.jit
def from_first(token, groups_h, groups_w, P_H: tl.constexpr, P_W: tl.constexpr, GRID: tl.constexpr):
    """Rows and columns from the first token of a window to others: the same for all windows."""
    token = token.to(tl.int64)  # an image may pass 2**31 elements
    return pixel(0, token // P_W, groups_h, P_H, GRID), pixel(0, token % P_W, groups_w, P_W, GRID)


@triton.jit
def channels(y, x, stride_h, stride_w, BLOCK_D: tl.constexpr):
    """Offsets (tokens, BLOCK_D) of the channels at each row and column."""
    return (y * stride_h + x * stride_w)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def exists_2d(exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mask of a (tokens, BLOCK_D) tile of which D channels exist."""
    mask = exists[:, None]
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return mask


@triton.jit
def bias_tile(bias, head, query, key, N: tl.constexpr):
    """`bias (h, N, N)` of some queries and keys, to base 2: -inf for keys that no window has, 0 for such queries."""
    at = head.to(tl.int64) * N * N + query[:, None] * N + key[None, :]
    tile = tl.load(bias + at, mask=(query < N)[:, None] & (key < N)[None, :], other=0.0).to(tl.float32) * LOG2_E
    return tl.where((key < N)[None, :], tile, -float("inf"))


@triton.jit
def in_fp32(number):
    """A scalar argument in fp32: a compiler passes Python's floats in fp64."""
    return tl.full((), number, tl.float32)


@triton.jit
def store_share(dbias, share, walker, head, heads, query, key, N: tl.constexpr):
    """Write a tile of this walker's share of the bias gradient, (walkers, h, N, N)."""
    at = (walker.to(tl.int64) * heads + head) * N * N + query[:, None] * N + key[None, :]
    tl.store(dbias + at, share, mask=(query < N)[:, None] & (key < N)[None, :])


@triton.jit
def dropout_factor(seed, window, head, heads, query, key, dropout_p, N: tl.constexpr):
    """0 for a dropped attention weight and 1 / (1 - p) for a kept one, of some queries and keys.

    A Philox random number is a function of the seed and of its place: image and group (`window`), head, query, key.
    So the backward pass, however it cuts the work, finds the same numbers.
    """
    pair = query[:, None] * N + key[None, :]
    stream = window.to(tl.int64) * heads + head
    random, _, _, _ = tl.philox(seed, pair, stream.to(tl.int32), (stream >> 32).to(tl.int32), 0)
    dropped = in_fp32(dropout_p)
    return tl.where(tl.uint_to_uniform_float(random) >= dropped, 1.0 / (1.0 - dropped), 0.0)


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = "tf32"):
    """a b + acc, summed in fp32. The interpreter takes bfloat16 for integers, so there the operands are widened."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
