"""Augmentation of batches, and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_shift(x_BCHW: Tensor, pixels: int) -> Tensor:
    """Move each image by up to `pixels` down or up and right or left; where it leaves a gap, its edge is repeated.

    Example:
        >>> images = torch.arange(9).view(1, 1, 3, 3)
        >>> random_shift(images, 0).equal(images)
        True
    """
    B, _, H, W = x_BCHW.shape
    down, right = torch.randint(-pixels, pixels + 1, (2, B, 1))
    rows = (torch.arange(H) - down).clamp(0, H - 1)
    columns = (torch.arange(W) - right).clamp(0, W - 1)
    indices = torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]
    return x_BCHW.permute(0, 2, 3, 1)[tuple(index.to(x_BCHW.device) for index in indices)].permute(0, 3, 1, 2)


def random_flip(x_BCHW: Tensor) -> Tensor:
    """Mirror each image left to right with probability one half."""
    chosen = (torch.rand(len(x_BCHW)) < 0.5).to(x_BCHW.device)
    return torch.where(chosen[:, None, None, None], x_BCHW.flip(-1), x_BCHW)


def normalise(x_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pixels to fp32, `(x / 255 - mean) / std`; `mean` and `std` have a value, or one a channel.

    Example:
        >>> normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), [0.5], [0.5]).flatten().tolist()
        [-1.0, 1.0]
    """
    mean_C11, std_C11 = (torch.tensor(value, device=x_BCHW.device).view(-1, 1, 1) for value in (mean, std))
    return (x_BCHW.float() / 255 - mean_C11) / std_C11
