"""Modules that give Max-SA its relative position bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maxattn.ops import rel_pos


class RelPosTable(nn.Module):
    """A learned bias for each offset between query and key: `forward()` gives `(heads, N, N)`."""

    def __init__(self, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros(heads, 2 * window[0] - 1, 2 * window[1] - 1))

    def forward(self) -> Tensor:
        return rel_pos.gather(self.table, self.window)

    def resize(self, window: tuple[int, int]) -> None:
        """Take another window: a new, bilinearly resized parameter, so make the optimizer afterwards."""
        if window != self.window:
            self.table = nn.Parameter(rel_pos.resize(self.table.detach(), window), self.table.requires_grad)
            self.window = window

    def extra_repr(self) -> str:
        return f"heads={self.table.shape[0]}, window={self.window}"


class RelPosLogMLP(nn.Module):
    """A bias computed from log-spaced offsets (Swin v2, section 3.3), so the same weights serve any window."""

    def __init__(self, heads: int, window: tuple[int, int], hidden: int = 512) -> None:
        super().__init__()
        self.window = window
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads)

    def forward(self) -> Tensor:
        offsets = rel_pos.log_offsets(self.window, self.fc1.weight.device).to(self.fc1.weight.dtype)
        table = self.fc2(torch.relu(self.fc1(offsets))).permute(2, 0, 1)
        return rel_pos.gather(table, self.window)

    def resize(self, window: tuple[int, int]) -> None:
        """Take another window; the weights stay."""
        self.window = window

    def extra_repr(self) -> str:
        return f"window={self.window}"
