"""A depthwise 3x3 convolution with its activation, and the means over pixels that squeeze-and-excitation wants."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.nn.gpu.arithmetic import activate, rounded


@triton.jit
def depthwise(
    x, weight, bias, out, means,
    H, W, C, out_H, out_W, top, left, runs, strips,
    ACT: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr, POOLED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`out (B, out_H, out_W, C) = act(x (B, H, W, C) * weight (3, 3, C) + bias)`, and `means (B, runs * strips, C)`.

    A program owns BLOCK_W columns and BLOCK_C channels of ROWS rows of the output: a strip of a run. It goes down the
    rows of the image and keeps the sums that each has begun, so that a pixel is loaded once for each of the kernel's
    columns: from memory the first time, then from L2, or with STAGES 1 from L1, which loads of a pipeline pass by.
    Pixels outside are zeros that no one has written: `top` and `left` are the padding there, and at the bottom and the
    right it is whatever the output's size needs. The means over pixels come in parts, one a program, summed in fp32
    before activations are rounded: their sum is the mean.
    """
    channel_tiles = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    tile_c, program = program % channel_tiles, program // channel_tiles
    strip, program = program % strips, program // strips
    run, image = program % runs, (program // runs).to(tl.int64)
    channel = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    column = strip * BLOCK_W + tl.arange(0, BLOCK_W)
    first = run * ROWS
    exists = (channel < C)[None, :]
    x += image * H * W * C
    out += image * out_H * out_W * C

    w00, w01, w02 = taps(weight, 0, channel, C)
    w10, w11, w12 = taps(weight, 1, channel, C)
    w20, w21, w22 = taps(weight, 2, channel, C)
    b = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    total = b
    if BIASED:
        b += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    left_column = column * STRIDE - left
    p0, p1, p2 = pixels(x, first * STRIDE - top, left_column, channel, H, W, C)
    begun = b + p0 * w00 + p1 * w01 + p2 * w02
    more = begun
    if STRIDE == 1:
        p0, p1, p2 = pixels(x, first - top + 1, left_column, channel, H, W, C)
        more = begun + p0 * w10 + p1 * w11 + p2 * w12
        begun = b + p0 * w00 + p1 * w01 + p2 * w02
    for step in tl.range(0, ROWS, num_stages=STAGES):
        y = (first + step) * STRIDE - top
        if STRIDE == 2:
            p0, p1, p2 = pixels(x, y + 1, left_column, channel, H, W, C)
            more = begun + p0 * w10 + p1 * w11 + p2 * w12
        p0, p1, p2 = pixels(x, y + 2, left_column, channel, H, W, C)
        acc = more + p0 * w20 + p1 * w21 + p2 * w22
        if STRIDE == 1:
            more = begun + p0 * w10 + p1 * w11 + p2 * w12
        begun = b + p0 * w00 + p1 * w01 + p2 * w02
        acc = activate(acc, ACT)
        written = (column < tl.where(first + step < out_H, out_W, 0))[:, None] & exists
        at = (first + step).to(tl.int64) * out_W * C + (column[:, None] * C + channel[None, :])
        tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=written)
        if POOLED:
            total += tl.where(written, acc, 0.0)
    if POOLED:
        part = (image * runs + run) * strips + strip
        tl.store(means + part * C + channel, tl.sum(total, 0) / (out_H * out_W), mask=channel < C)


@triton.jit
def taps(weight, row: tl.constexpr, channel, C):
    """A row of the kernel: three columns, each (1, BLOCK_C)."""
    at = weight + row * 3 * C + channel
    w0 = tl.load(at, mask=channel < C, other=0.0).to(tl.float32)
    w1 = tl.load(at + C, mask=channel < C, other=0.0).to(tl.float32)
    w2 = tl.load(at + 2 * C, mask=channel < C, other=0.0).to(tl.float32)
    return w0[None, :], w1[None, :], w2[None, :]


@triton.jit
def pixels(x, y, left_column, channel, H, W, C):
    """A row of the image as the kernel's three columns see it, each (BLOCK_W, BLOCK_C) in fp32; zeros outside."""
    known = (channel < C)[None, :]
    width = tl.where((y >= 0) & (y < H), W, 0)  # a row outside has no columns
    row = x + y.to(tl.int64) * W * C
    seen = left_column[:, None]
    at = seen * C + channel[None, :]
    p0 = tl.load(row + at, mask=known & (seen >= 0) & (seen < width), other=0.0)
    p1 = tl.load(row + at + C, mask=known & (seen + 1 >= 0) & (seen + 1 < width), other=0.0)
    p2 = tl.load(row + at + 2 * C, mask=known & (seen + 2 >= 0) & (seen + 2 < width), other=0.0)
    return p0.to(tl.float32), p1.to(tl.float32), p2.to(tl.float32)
