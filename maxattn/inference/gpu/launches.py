"""How each kernel is cut and run, and what is left to cuBLAS. NOT MEASURED YET: chosen to fit an H200 without spills.

What was looked at is what the compiler says for compute capability 9.0: registers, spills and shared memory of every
launch that the presets need. Which is fastest only a GPU can say.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Of a product of matrices: rows, columns and depth of a tile, warps, and stages of the software pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Of a pass over `(rows, channels)`: rows and channels of a tile, and warps."""

    rows: int
    channels: int
    warps: int


class Strip(NamedTuple):
    """Of a depthwise convolution: rows, columns and channels that a program owns, warps, and stages of the pipeline."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


NARROW = 128
"""Up to so many channels, a program holds whole rows: what a norm needs is within the product then, and an MLP is one
kernel. With more, tiles fill the registers, and a norm is a pass of its own."""

GATHERED_CHANNELS = 128
"""Up to so many channels and outputs, a dense convolution is ours: wider, cuDNN's is the faster one."""

ALIGNED = 16
"""Rows are held of multiples of so many channels: of others loads are narrow, and registers spill."""

LIBRARY = frozenset({"none", "relu", "gelu_tanh"})
"""Activations that cuBLASLt applies to a product with nothing else around it; the GELU of `torch._addmm_activation` is
the one with tanh on a GPU, the exact one on a CPU."""


def pointwise(rows: int, columns: int, depth: int) -> Tile:
    """For a product of `(rows, depth)` and `(depth, columns)`."""
    block_k = 64 if depth % 64 == 0 else 32
    wide = block_of(columns, 16, 128)
    if rows <= 64 * 132:  # few tiles: smaller ones, so that every multiprocessor has one
        return Tile(64, min(wide, 64), block_k, 4, 4)
    return Tile(128, wide, block_k, 8 if wide == 128 else 4, 3)


def convolution(channels: int, columns: int) -> Tile:
    """For a dense convolution to so many `columns`."""
    block_k = next((block for block in (64, 32, 16) if channels % block == 0), 32)
    return Tile(128, block_of(columns, 16, 128), block_k, 8 if columns > 64 else 4, 3)


def narrow(channels: int, outputs: int) -> Tile:
    """For a product of so few channels, which are the depth of a tile, to so many outputs."""
    return Tile(128, block_of(outputs, 16, 64), block_of(channels, 16, 1024), 4, 3)


def norm(channels: int) -> Rows:
    """For a norm of so many channels, all in a tile."""
    block = block_of(channels, 16, 1 << 16)
    return Rows(max(1, 4096 // block), block, 4)


def mlp(channels: int) -> Tile:
    """For an MLP of so many channels, which are the columns of a tile; its depth is a share of the hidden ones."""
    return Tile(64, block_of(channels, 16, 1024), 64, 4, 3)


def depthwise(height: int, width: int, channels: int, stride: int) -> Strip:
    """For an output of `height` x `width` pixels."""
    rows = next((rows for rows in (28, 14) if height % rows == 0), min(block_of(height, 1, 16), 16))
    return Strip(rows, 4, 64, 1, 3)


def pool(channels: int) -> Rows:
    """For pooling of so many channels."""
    block = block_of(channels, 16, 64)
    return Rows(1024 // block, block, 4)


def block_of(size: int, least: int, most: int) -> int:
    """The power of two that holds `size`, within limits.

    Example:
        >>> block_of(24, 16, 128), block_of(3, 16, 128), block_of(384, 16, 128)
        (32, 16, 128)
    """
    return min(max(least, 1 << (size - 1).bit_length()), most)
