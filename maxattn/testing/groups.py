"""The image by groups, as the specification forms them."""

from __future__ import annotations

import torch
from torch import Tensor

from maxattn.ops.contract import Problem
from maxattn.ops.naive import groups_and_tokens


def by_group(x: Tensor, problem: Problem) -> Tensor:
    """`x (B, H, W, ...)` as `(B, groups, N, ...)`, with zeros for tokens outside the image.

    Example:
        >>> import torch
        >>> problem = Problem(axis="grid", window=(1, 2), batch=1, height=1, width=3, heads=1, head_dim=1)
        >>> by_group(torch.tensor([5, 6, 7]).view(1, 1, 3), problem).tolist()
        [[[5, 7], [6, 0]]]
    """
    H, W = x.shape[1:3]
    (y, _, _), (x_, _, _) = (
        groups_and_tokens(size, side, problem.axis, x.device) for size, side in zip((H, W), problem.window, strict=True)
    )
    inside = (y < H)[:, None, :, None] & (x_ < W)[None, :, None, :]
    found = x[:, y.clamp(max=H - 1)[:, None, :, None], x_.clamp(max=W - 1)[None, :, None, :]]
    found = found.masked_fill(~inside.view(1, *inside.shape, *(1,) * (x.ndim - 3)), 0)
    return found.flatten(3, 4).flatten(1, 2)


def token_of_pixel(height: int, width: int, problem: Problem, device: torch.device) -> Tensor:
    """The number of each pixel's token in its window, `(H, W)`.

    Example:
        >>> problem = Problem(axis="grid", window=(1, 2), batch=1, height=1, width=3, heads=1, head_dim=1)
        >>> token_of_pixel(1, 3, problem, "cpu").tolist()
        [[0, 0, 1]]
    """
    rows, columns = (
        groups_and_tokens(size, side, problem.axis, device)[2]
        for size, side in zip((height, width), problem.window, strict=True)
    )
    return rows[:, None] * problem.window[1] + columns[None, :]
