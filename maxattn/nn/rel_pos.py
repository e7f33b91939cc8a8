"""Modules that give Max-SA its relative position bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maxattn.ops import rel_pos


class RelPosTable(nn.Module):
    """A learned bias for each offset between query and key: `forward()` gives `(heads, N, N)`.

    Without gradients and in eval mode, the gathered bias is kept until the table changes.
    """

    def __init__(self, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros(heads, 2 * window[0] - 1, 2 * window[1] - 1))
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.table.is_inference():
            return rel_pos.gather(self.table, self.window)
        key = (self.table.data_ptr(), self.table._version, self.table.dtype, self.table.device, self.window)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, rel_pos.gather(self.table, self.window)
        return self._kept[1]

    def resize(self, window: tuple[int, int]) -> None:
        """Take another window, the table being resized bilinearly."""
        self.table = nn.Parameter(rel_pos.resize(self.table.detach(), window), self.table.requires_grad)
        self.window, self._kept = window, None

    def train(self, mode: bool = True) -> RelPosTable:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> RelPosTable:
        self._kept = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

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
