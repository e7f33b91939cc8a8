"""Windows for backends that need them: cut the image into groups of tokens, and put the results back.

Where the window does not divide the image, the groups along one side come in at most two sizes, and each group holds
the first tokens of its window. So a ragged image is at most four regular problems, with a corner of the bias each:
no padding, no mask. Shapes: `(B, H, W, ...)` on the image, `(B * groups, tokens, ...)` in windows.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Axis

LARGEST_BATCH = 65_535
"""CUDA kernels put the batch on a grid axis of 16 bits: more windows than this fail or are declined silently."""

ALIGNMENT = 16
"""Bytes that fused CUDA kernels read at a time."""


class Span(NamedTuple):
    """A run of groups along one side of the image that hold equally many tokens."""

    first: int
    groups: int
    tokens: int


def spans(size: int, window: int, axis: Axis) -> list[Span]:
    """The runs of equal groups along a side of `size` pixels.

    Example:
        >>> spans(16, 7, "block")
        [Span(first=0, groups=2, tokens=7), Span(first=2, groups=1, tokens=2)]
        >>> spans(16, 7, "grid")
        [Span(first=0, groups=1, tokens=6), Span(first=1, groups=2, tokens=5)]
    """
    groups = (size + window - 1) // window
    if axis == "block":
        full, rest = size // window, size % window
        runs = [Span(0, full, window), Span(full, 1 if rest else 0, rest)]
    else:
        tokens, longer = size // groups, size % groups
        runs = [Span(0, longer, tokens + 1), Span(longer, groups - longer, tokens)]
    return [run for run in runs if run.groups > 0]


def for_each_size(
    qkv: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    axis: Axis,
    attend: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Max-SA of the image by a function that knows only full windows.

    `attend` is given windows `(batch * groups, tokens, 3, heads, head_dim)` and their bias
    `(heads, tokens, tokens)`, and returns `(batch * groups, tokens, heads, head_dim)`. It is called once for each
    size of group, so once where the window divides the image. Returns a contiguous `(B, H, W, heads, head_dim)`.

    A compiler traces one way to cut an image, and traces anew for another height or width: with these as symbols,
    tracing one call and its gradient takes up to a minute.
    """
    batch, height, width = qkv.shape[0], index(qkv.shape[1]), index(qkv.shape[2])
    strips = []
    for rows in spans(height, window[0], axis):
        parts = []
        for columns in spans(width, window[1], axis):
            out = attend(partition(qkv, rows, columns, window, axis), _bias_corner(bias, rows, columns, window))
            parts.append(unpartition(out, batch, rows, columns))
        strips.append(parts)
    if len(strips) == len(strips[0]) == 1:
        return _merge(strips[0][0], axis).contiguous()
    return _join([_join(parts, 3, width, axis) for parts in strips], 1, height, axis).contiguous()


def partition(x: Tensor, rows: Span, columns: Span, window: tuple[int, int], axis: Axis) -> Tensor:
    """`x (B, H, W, ...)` to the windows of `rows` x `columns`: `(B * groups, tokens, ...)`, one copy.

    Example:
        >>> x = torch.arange(16).view(1, 4, 4)
        >>> partition(x, Span(0, 2, 2), Span(0, 2, 2), (2, 2), "grid")[0].tolist()
        [0, 2, 8, 10]
    """
    tiles = _split(_split(x, 2, columns, window[1], axis), 1, rows, window[0], axis)
    groups = x.shape[0] * rows.groups * columns.groups
    return tiles.transpose(2, 3).reshape(groups, rows.tokens * columns.tokens, *x.shape[3:])


def unpartition(windows: Tensor, batch: int, rows: Span, columns: Span) -> Tensor:
    """Windows `(B * groups, tokens, ...)` as `(B, row groups, row tokens, column groups, column tokens, ...)`."""
    shape = (batch, rows.groups, columns.groups, rows.tokens, columns.tokens)
    return windows.reshape(*shape, *windows.shape[2:]).transpose(2, 3)


def cat(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def fused(
    qkv: Tensor,
    bias: Tensor | None,
    attend: Callable[[Tensor, Tensor | None], Tensor],
    *,
    compiling: bool = False,
    largest_batch: int = LARGEST_BATCH,
) -> Tensor:
    """What `attend` gives for windows `(windows, tokens, 3, heads, head_dim)`, called as CUDA's fused kernels need it.

    On at most 65,535 windows at a time, and not at all where there are none; on tensors, and with a gradient, that
    start and step by multiples of 16 bytes. Not so while a compiler traces it, which lays out its own tensors.
    For kernels that find the windows themselves, images `(B, H, W, 3, heads, head_dim)` may take the windows' place.

    Example:
        >>> values = fused(torch.arange(6.0).view(2, 1, 3, 1, 1), None, lambda qkv, bias: qkv[:, :, 2])
        >>> values.flatten().tolist()
        [2.0, 5.0]
    """
    if qkv.shape[0] == 0:
        nothing = qkv.select(-3, 2)
        return nothing if bias is None else nothing + bias.sum().to(nothing.dtype)
    parts = [qkv] if qkv.shape[0] <= largest_batch else list(qkv.split(largest_batch))
    outs = [attend(part if compiling else aligned(part), bias) for part in parts]
    for out in outs:
        if out.requires_grad and not compiling:
            out.register_hook(aligned)
    return cat(outs, 0)


def aligned(x: Tensor) -> Tensor:
    """`x`, copied unless its last stride is 1 and it starts, and steps, by multiples of 16 bytes.

    Example:
        >>> aligned(torch.zeros(4, 9)[:, 1:]).stride()
        (8, 1)
    """
    steps = (x.storage_offset(), *x.stride()[:-1])
    fits = x.stride(-1) == 1 and all(step * x.element_size() % ALIGNMENT == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def positive_scale(qkv: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same logits from a scale above 0, for kernels that go wrong with others: its sign, or the 0, moves into q.

    `qkv` is `(..., 3, heads, head_dim)`. Exact.

    Example:
        >>> qkv, scale = positive_scale(torch.ones(1, 1, 3, 1, 1), -0.5)
        >>> qkv.flatten().tolist(), scale
        ([-1.0, 1.0, 1.0], 0.5)
    """
    if scale > 0:
        return qkv, scale
    q, rest = qkv.split([1, 2], -3)
    return torch.cat([-q if scale < 0 else q * 0, rest], -3), -scale if scale < 0 else 1.0


def _split(x: Tensor, dim: int, span: Span, window: int, axis: Axis) -> Tensor:
    """A view of `x` with dimension `dim` replaced by two, (groups, tokens), for the groups of `span`."""
    size = x.shape[dim]
    if axis == "block":
        pixels = x.narrow(dim, span.first * window, span.groups * span.tokens)
        return pixels.unflatten(dim, (span.groups, span.tokens))
    stride = (size + window - 1) // window
    if span.groups == stride:
        return x.unflatten(dim, (span.tokens, span.groups)).transpose(dim, dim + 1)
    pixels = x.narrow(dim, span.first, (span.tokens - 1) * stride + span.groups)
    return pixels.unfold(dim, span.groups, stride).movedim(-1, dim)


def _join(parts: list[Tensor], dim: int, size: int, axis: Axis) -> Tensor:
    """The inverse of `_split`, given the results for every span in order: `size` pixels again along `dim`."""
    if axis == "block":
        return cat([part.flatten(dim, dim + 1) for part in parts], dim)
    tokens = max(part.shape[dim + 1] for part in parts)
    grid = cat([_lengthen(part, dim + 1, tokens) for part in parts], dim).transpose(dim, dim + 1)
    return grid.flatten(dim, dim + 1).narrow(dim, 0, size)


def _merge(x: Tensor, axis: Axis) -> Tensor:
    """Both sides of `unpartition`'s result joined at once, where all groups are of one size: one copy."""
    if axis == "grid":
        x = x.transpose(1, 2).transpose(3, 4)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])


def _lengthen(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return torch.cat([x, x.narrow(dim, 0, missing)], dim) if missing else x


def _bias_corner(bias: Tensor | None, rows: Span, columns: Span, window: tuple[int, int]) -> Tensor | None:
    """The part of `bias (heads, N, N)` among the first `rows.tokens` x `columns.tokens` tokens of the window."""
    if bias is None or (rows.tokens, columns.tokens) == window:
        return bias
    tokens = rows.tokens * columns.tokens
    table = bias.unflatten(2, window).unflatten(1, window)
    return table[:, : rows.tokens, : columns.tokens, : rows.tokens, : columns.tokens].reshape(-1, tokens, tokens)
