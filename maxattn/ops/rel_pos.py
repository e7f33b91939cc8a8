"""Relative position bias: from a table of offsets to `(heads, N, N)`, and from one window's table to another's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The bias `(heads, N, N)`, query first, of a table `(heads, 2 P_h - 1, 2 P_w - 1)`; differentiable.

    The entry for query (y, x) and key (v, u) is `table[:, v - y + P_h - 1, u - x + P_w - 1]`.

    Example:
        >>> gather(torch.arange(3.0).view(1, 1, 3), (1, 2)).tolist()
        [[[1.0, 2.0], [0.0, 1.0]]]
    """
    P_h, P_w = window
    offsets = table.unfold(1, P_h, 1).unfold(2, P_w, 1)  # (heads, P_h - 1 - y, P_w - 1 - x, v, u)
    return offsets.flip(1, 2).reshape(table.shape[0], P_h * P_w, P_h * P_w)


def resize(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table `(heads, 2 P_h - 1, 2 P_w - 1)` for another window, bilinearly, as the official MaxViT code does.

    Example:
        >>> resize(torch.zeros(2, 13, 13), (12, 12)).shape
        torch.Size([2, 23, 23])
    """
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    if tuple(table.shape[1:]) == size:
        return table
    resized = F.interpolate(table[None].double(), size=size, mode="bilinear", align_corners=False)
    return resized[0].to(table.dtype)


def log_offsets(window: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Offsets `(2 P_h - 1, 2 P_w - 1, 2)` between key and query, log-spaced: `sign(x) log(1 + |x|)` (Swin v2, eq. 4).

    Example:
        >>> log_offsets((1, 2))[0, :, 1]
        tensor([-0.6931,  0.0000,  0.6931])
    """
    y, x = (torch.arange(1 - size, size, dtype=torch.float32, device=device) for size in window)
    offsets = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
    return offsets.sign() * offsets.abs().log1p()
