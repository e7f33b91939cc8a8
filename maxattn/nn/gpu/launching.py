"""How operators launch their kernels, and share work among programs. Importing this imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

COMPILED = not triton.knobs.runtime.interpret
operator: Callable[..., Any] = triton_op if COMPILED else custom_op
"""A compiler sees what a `triton_op` is made of. Interpreted kernels are none that it could launch."""

CHANNELS = 64
"""Of a tile."""
PROGRAMS = 1056
"""About how many of them sum over pixels: 8 on each multiprocessor of an H200."""


def launch(function: Any, *grid: int) -> Any:
    """What to call with a kernel's arguments, for a grid of so many programs."""
    return (wrap_triton(function) if COMPILED else function)[grid]


def asked(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the gradients of an operator's inputs those that are asked for; None for each of the others."""
    return tuple(one if needed else None for one, needed in zip(gradients, ctx.needs_input_grad, strict=True))


def blocks_of(size: int, block: int) -> int:
    """How many blocks hold so many.

    Example:
        >>> blocks_of(64, 32), blocks_of(65, 32)
        (2, 3)
    """
    return (size + block - 1) // block


def parts_of(rows: int, tile: int, wanted: int) -> tuple[int, int]:
    """Rows of a part, whole tiles of them, and how many parts there are: about as many as wanted.

    Example:
        >>> parts_of(100, 8, wanted=4), parts_of(5, 8, wanted=0)
        ((32, 4), (8, 1))
    """
    each = tile * blocks_of(blocks_of(rows, max(1, wanted)), tile)
    return each, blocks_of(rows, each)
