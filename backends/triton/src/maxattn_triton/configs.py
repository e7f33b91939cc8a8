"""Which kernels serve a window, and how each is launched: a small table, measured on an NVIDIA H200.

Measured were 16-bit dtypes and a head_dim of 32, which is what MaxViT has. Everything else is launched so that it fits:
few spilled registers, and shared memory that an sm80 has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from maxattn.ops.contract import Problem


class Key(NamedTuple):
    """What a launch depends on: the kernel, the tokens of a window, the head dim, and the bytes of an element."""

    kernel: str
    tokens: int
    head_dim: int
    itemsize: int


class Launch(NamedTuple):
    """How a kernel is cut and run.

    A program owns a tile of `block_m` queries (or keys) and takes the others in parts of `block_n`. Then: warps of a
    program, stages of the software pipeline, programs per streaming multiprocessor, and how many windows a program of
    `tiles` takes side by side, sharing the tiles of the bias that it loads.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    sharing: int = 1


MEASURED = {
    "rows.forward": {
        64: Launch(64, 64, 4, 3, 3),
        160: Launch(32, 64, 2, 3, 4),
        256: Launch(64, 128, 4, 3, 2),
    },
    "tiles.forward": {4096: Launch(64, 64, 4, 3, 2, sharing=2)},
    "whole.backward": {64: Launch(64, 64, 4, 3, 2)},
    "rows.backward": {200: Launch(64, 32, 4, 3, 2), 256: Launch(64, 32, 4, 2, 2)},
    "columns.backward": {
        160: Launch(64, 64, 4, 3, 2),
        200: Launch(64, 32, 4, 3, 2),
        256: Launch(64, 32, 4, 2, 2),
    },
    "tiles.backward_queries": {4096: Launch(64, 64, 4, 3, 2, sharing=2)},
    "tiles.backward_keys": {4096: Launch(64, 64, 4, 3, 2)},
    "tiles.backward_bias": {4096: Launch(64, 64, 4, 3, 3)},
}
"""By kernel and largest number of tokens, for 16-bit dtypes and head dims up to 32."""

BACKWARD = {
    "whole": ["whole.backward"],
    "rows": ["rows.backward", "columns.backward"],
    "tiles": ["tiles.backward_queries", "tiles.backward_keys", "tiles.backward_bias"],
}
"""The kernels of each family, in the order in which they run."""

SHARING = ("tiles.forward", "tiles.backward_queries")
"""The kernels that may take windows side by side."""

_forced: dict[str, Launch] = {}


def forward_kernel(tokens: int, head_dim: int, itemsize: int) -> str:
    """`rows` unrolls all keys of a window, `tiles` loops over them.

    Example:
        >>> forward_kernel(49, 32, 2), forward_kernel(784, 32, 2)
        ('rows', 'tiles')
    """
    return "rows" if itemsize == 2 and (tokens <= 64 or (tokens <= 256 and head_dim <= 32)) else "tiles"


def backward_kernel(tokens: int, head_dim: int, itemsize: int) -> str:
    """`whole` takes a window as one tile, `rows` holds the bias gradient of its queries for all keys, `tiles` loops.

    Example:
        >>> [backward_kernel(tokens, 32, 2) for tokens in (49, 144, 784)]
        ['whole', 'rows', 'tiles']
    """
    if itemsize == 2 and tokens <= 64 and head_dim <= 64:
        return "whole"
    return "rows" if itemsize == 2 and tokens <= 256 and head_dim <= 32 else "tiles"


def keys(problem: Problem) -> list[Key]:
    """The kernels that serve a problem, in the order in which they run."""
    size = problem.tokens, problem.head_dim, problem.dtype.itemsize
    kernels = [f"{forward_kernel(*size)}.forward"]
    if problem.differentiated:
        kernels += BACKWARD[backward_kernel(*size)]
    if not problem.bias_requires_grad and "tiles.backward_bias" in kernels:
        kernels.remove("tiles.backward_bias")
    return [Key(kernel, *size) for kernel in kernels]


def launch(key: Key) -> Launch:
    """How to launch a kernel: as is forced, else as was measured on this machine, else by the table."""
    from maxattn_triton import tuned

    return _forced.get(key.kernel) or tuned.launch(key) or _by_default(key)


def _by_default(key: Key) -> Launch:
    kernel, tokens, head_dim, itemsize = key
    if head_dim <= 32 and itemsize == 2 and kernel in MEASURED:
        return next(launch for largest, launch in MEASURED[kernel].items() if tokens <= largest)
    if kernel == "rows.forward":
        return Launch(64, 64, 4, 2, 2)
    if kernel == "whole.backward":
        return Launch(64, 64, 8, 2, 2)
    if itemsize == 4:
        return Launch(32, 32, 4, 1, 4)
    return Launch(64, 32, 8, 2, 2) if head_dim > 64 else Launch(64, 64, 4, 2, 2)


def block_of(size: int) -> int:
    """The side of a tile that holds `size`: a power of two, and not below what the tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


@contextmanager
def forced(kernel: str, launch: Launch) -> Iterator[None]:
    """Launch `kernel` so within the block, in all threads: for those who measure."""
    _forced[kernel] = launch
    try:
        yield
    finally:
        del _forced[kernel]
