"""A depthwise convolution of channels-last images, and the gradients of its input and its kernel. In Triton.

A program has a tile of ROWS x BLOCK_W pixels and BLOCK_C channels, and goes down its rows: a row of what it reads is
loaded once for each column of the kernel, from memory the first time and then from L1, and added to all sums that it
belongs to. The loops are unrolled, so that loads of later rows do not wait for the sums of earlier ones. Nothing is
padded: pixels outside are zeros that no one has written. Sums are in fp32 and in a fixed order, so that results are
the same in every run.

A kernel is `weight (K * K, C)`, of any float; of images in memory, only an offset within a row has to fit 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.nn.gpu.arithmetic import rounded


@triton.jit
def forward(
    x, weight, out, H, W, C, OH, OW, top, left,
    K: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`out (B, OH, OW, C)` of `x (B, H, W, C)` with `top` rows and `left` columns of zeros before it."""
    tile, channel = share_of(tl.program_id(0), C, BLOCK_C)
    image, first, column = tile_of(tile, OH, OW, ROWS, BLOCK_W)
    x += image * H * W * C
    out += image * OH * OW * C
    w = taps(weight, channel, C, K)
    sums = (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),) * ROWS
    for q in tl.static_range(STRIDE * (ROWS - 1) + K):
        pixels = columns_of(x, first * STRIDE - top + q, column * STRIDE - left, 1, channel, H, W, C, K)
        for r in tl.static_range(K):
            if q >= r and (q - r) % STRIDE == 0 and (q - r) // STRIDE < ROWS:
                for s in tl.static_range(K):
                    sums = added(sums, (q - r) // STRIDE, pixels[s].to(tl.float32) * w[r * K + s])
    for m in tl.static_range(ROWS):
        store(out, sums[m], first + m, column, channel, OH, OW, C)


@triton.jit
def data_gradient(
    dy, weight, dx, H, W, C, OH, OW, top, left,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`dx (B, H, W, C)` of `dy (B, OH, OW, C)` at a stride of 2. At 1 it is `forward` with the kernel turned around.

    Pixels of dx come in 2 x 2 phases: of the kernel's rows every second one meets a row of dx, of its columns likewise.
    A program writes all phases of a tile, which see the same (K + 1) / 2 rows and columns of dy.
    """
    SEEN: tl.constexpr = (K + 1) // 2
    tile, channel = share_of(tl.program_id(0), C, BLOCK_C)
    image, first, column = tile_of(tile, phased(H, top), phased(W, left), ROWS, BLOCK_W)
    first, column = first + top // 2, column + left // 2
    dy += image * OH * OW * C
    dx += image * H * W * C
    w = taps(weight, channel, C, K)
    sums = (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),) * (4 * ROWS)
    for q in tl.static_range(ROWS + SEEN - 1):
        pixels = columns_of(dy, first + q - SEEN + 1, column, -1, channel, OH, OW, C, SEEN)
        for r in tl.static_range(K):
            if q + r // 2 >= SEEN - 1 and q + r // 2 < SEEN - 1 + ROWS:
                for s in tl.static_range(K):
                    value = pixels[s // 2].to(tl.float32) * w[r * K + s]
                    sums = added(sums, 4 * (q + r // 2 - SEEN + 1) + 2 * (r % 2) + s % 2, value)
    for m in tl.static_range(ROWS):
        for phase in tl.static_range(4):
            y, x = 2 * (first + m) + phase // 2 - top, 2 * column + phase % 2 - left
            store(dx, sums[4 * m + phase], y, x, channel, H, W, C)


@triton.jit
def weight_gradient(
    dy, x, parts, tiles, H, W, C, OH, OW, top, left, TILES,
    K: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`parts (parts, K * K, C)` in fp32: the kernel's gradient from TILES tiles of dy each, of `tiles` in all."""
    part, channel = share_of(tl.program_id(0), C, BLOCK_C)
    sums = (tl.zeros((BLOCK_W, BLOCK_C), tl.float32),) * (K * K)
    for tile in range(part * TILES, tl.minimum((part + 1) * TILES, tiles)):
        image, first, column = tile_of(tile, OH, OW, ROWS, BLOCK_W)
        x_image, dy_image = x + image * H * W * C, dy + image * OH * OW * C
        gradients = ()
        for q in tl.static_range(STRIDE * (ROWS - 1) + K):
            if q % STRIDE == 0 and q // STRIDE < ROWS:
                gradients += columns_of(dy_image, first + q // STRIDE, column, 1, channel, OH, OW, C, 1)
            pixels = columns_of(x_image, first * STRIDE - top + q, column * STRIDE - left, 1, channel, H, W, C, K)
            for r in tl.static_range(K):
                if q >= r and (q - r) % STRIDE == 0 and (q - r) // STRIDE < ROWS:
                    gradient = gradients[(q - r) // STRIDE].to(tl.float32)
                    for s in tl.static_range(K):
                        sums = added(sums, r * K + s, pixels[s].to(tl.float32) * gradient)
    parts += part.to(tl.int64) * K * K * C
    for tap in tl.static_range(K * K):
        tl.store(parts + tap * C + channel, tl.sum(sums[tap], 0), mask=channel < C)


@triton.jit
def share_of(program, C, BLOCK_C: tl.constexpr):
    """The part of all pixels that is a program's, and its channels: those of a pixel go to one after another."""
    blocks = tl.cdiv(C, BLOCK_C)
    return program // blocks, program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def phased(size, before):
    """How many pairs of pixels a stride of 2 makes of `size`, of which the first has `before` zeros before it."""
    return (size - 1 + before) // 2 - before // 2 + 1


@triton.jit
def tile_of(tile, H, W, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of a tile of (B, H, W) pixels: its image, its first row, and its columns, `(BLOCK_W)`."""
    strips, runs = tl.cdiv(W, BLOCK_W), tl.cdiv(H, ROWS)
    image = (tile // strips // runs).to(tl.int64)
    return image, tile // strips % runs * ROWS, tile % strips * BLOCK_W + tl.arange(0, BLOCK_W)


@triton.jit
def taps(weight, channel, C, K: tl.constexpr):
    """The kernel's K * K pixels, each (1, BLOCK_C) in fp32."""
    loaded = ()
    for tap in tl.static_range(K * K):
        w = tl.load(weight + tap * C + channel, mask=channel < C, other=0.0)
        loaded += (w.to(tl.float32)[None, :],)
    return loaded


@triton.jit
def columns_of(image, y, column, STEP: tl.constexpr, channel, H, W, C, COUNT: tl.constexpr):
    """Pixels of row y at `column`, and at COUNT - 1 times STEP to the right: each (BLOCK_W, BLOCK_C), zeros outside."""
    width = tl.where((y >= 0) & (y < H), W, 0)  # a row outside has no columns
    row, known = image + y.to(tl.int64) * W * C, (channel < C)[None, :]
    loaded = ()
    for s in tl.static_range(COUNT):
        seen = (column + STEP * s)[:, None]
        inside = known & (seen >= 0) & (seen < width)
        loaded += (tl.load(row + (seen * C + channel[None, :]), mask=inside, other=0.0),)
    return loaded


@triton.jit
def added(sums, AT: tl.constexpr, value):
    """A tuple of sums, of which one is greater by `value`."""
    return sums[:AT] + (sums[AT] + value,) + sums[AT + 1 :]  # noqa: RUF005 - Triton has no stars in a tuple


@triton.jit
def store(image, value, y, column, channel, H, W, C):
    """Writes `value (BLOCK_W, BLOCK_C)` to row y of an image, where it has such pixels."""
    width = tl.where((y >= 0) & (y < H), W, 0)
    inside = (channel < C)[None, :] & (column >= 0)[:, None] & (column < width)[:, None]
    at = image + y.to(tl.int64) * W * C + (column[:, None] * C + channel[None, :])
    tl.store(at, rounded(value, image.dtype.element_ty), mask=inside)
