"""Average pooling of NHWC."""

from __future__ import annotations

import triton
import triton.language as tl

from maxattn.nn.gpu.arithmetic import rounded


@triton.jit
def pool(
    x, out,
    M, H, W, C, out_H, out_W,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`out (B, out_H, out_W, C)` of `x (B, H, W, C)`: means of KERNEL x KERNEL pixels, STRIDE apart; M counts outputs.

    Pixels outside are zeros, which count if PADDED, and else do not. A program owns BLOCK_M outputs and BLOCK_C of
    their channels.
    """
    channel_tiles = tl.cdiv(C, BLOCK_C)
    pixel = tl.program_id(0) // channel_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    image, inside = pixel // (out_H * out_W), pixel % (out_H * out_W)
    top = inside // out_W * STRIDE - PADDING
    left = inside % out_W * STRIDE - PADDING
    exists = (pixel < M)[:, None] & (channel < C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for down in tl.static_range(KERNEL):
        for across in tl.static_range(KERNEL):
            y, column = top + down, left + across
            known = (y >= 0) & (y < H) & (column >= 0) & (column < W)
            at = ((image.to(tl.int64) * H + y) * W + column)[:, None] * C + channel[None, :]
            total += tl.load(x + at, mask=exists & known[:, None], other=0.0).to(tl.float32)
    if PADDED:
        total *= 1.0 / (KERNEL * KERNEL)
    else:
        rows = tl.minimum(top + KERNEL, H) - tl.maximum(top, 0)
        columns = tl.minimum(left + KERNEL, W) - tl.maximum(left, 0)
        total /= (rows * columns).to(tl.float32)[:, None]
    tl.store(
        out + pixel.to(tl.int64)[:, None] * C + channel[None, :], rounded(total, out.dtype.element_ty), mask=exists
    )
