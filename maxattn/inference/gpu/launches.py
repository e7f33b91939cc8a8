"""How each kernel is cut and run, and what is left to cuBLAS.

Chosen among those that fit an H200's registers, as which were faster there for the kernels of MaxViT-T at 224 and of
MaxViT-B at 384 in bfloat16. Kernels of less than 0.1 ms were not told apart.
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

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the operands of its stages take, of 16 bits; gates of each row take more."""
        return 2 * self.stages * (self.rows + self.columns) * self.depth


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

SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on an H200."""

LIBRARY = frozenset({"none", "relu", "gelu_tanh"})
"""Activations that cuBLASLt applies to a product with nothing else around it, faster than we; the GELU of
`torch._addmm_activation` is the one with tanh on a GPU, the exact one on a CPU."""


def pointwise(rows: int, columns: int, depth: int, gated: bool, shared: int = SHARED) -> Tile:
    """For a product of `(rows, depth)`, gated or not, and `(depth, columns)`, on a GPU with so much shared memory."""
    block_k = 64 if depth % 64 == 0 else 32
    wide = 64 if columns % 128 == 64 else block_of(columns, 16, 128)
    if rows <= 64 * 132:  # few tiles: smaller ones, so that every multiprocessor has one
        return Tile(64, min(wide, 64), block_k, 4, 4)
    if depth <= 128 and columns > depth:  # little to load for what is written
        return Tile(128, wide, 32, 4, 4)
    if not gated:
        return Tile(128, wide, block_k, 8 if wide == 128 else 4, 3)
    small = Tile(128, wide, block_k, 4, 3)  # what is gated passes through registers, of which a thread has more then
    large = _large(columns, block_k)
    return large if large and large.shared <= shared else small


def _large(columns: int, block_k: int) -> Tile | None:
    """A tile of whose loads more use is made, where it fits the columns."""
    if 64 < columns <= 128:
        return Tile(256, 128, block_k, 8, 3)
    return Tile(128, 256, block_k, 8, 3) if 128 < columns < 256 or columns % 256 == 0 else None


def convolution(channels: int, columns: int) -> Tile:
    """For a dense convolution to so many `columns`."""
    block_k = next((block for block in (64, 32, 16) if channels % block == 0), 32)
    return Tile(128, block_of(columns, 16, 128), block_k, 8 if columns > 64 else 4, 3)


def narrow(channels: int, outputs: int) -> Tile:
    """For a product of so few channels, which are the depth of a tile, to so many outputs."""
    return Tile(128, block_of(outputs, 16, 64 if channels <= 64 else 32), block_of(channels, 16, 1024), 4, 3)


def norm(channels: int) -> Rows:
    """For a norm of so many channels, all in a tile."""
    block = block_of(channels, 16, 1 << 16)
    return Rows(max(1, 4096 // block), block, 4)


def mlp(channels: int) -> Tile:
    """For an MLP of so many channels, which are the columns of a tile; its depth is a share of the hidden ones."""
    return Tile(64, block_of(channels, 16, 1024), 64, 4, 3)


def depthwise(height: int, width: int, channels: int) -> Strip:
    """For an output of `height` x `width` pixels: a warp has 8 channels a thread."""
    dividing = max(rows for rows in range(1, 17) if height % rows == 0)
    rows = dividing if dividing >= 7 else min(block_of(height, 1, 16), 16)
    narrow = 8 < width <= 28 and channels % 128 == 0
    return Strip(rows, 2 if narrow else 4, 128 if narrow else 64, 1, 3)


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
