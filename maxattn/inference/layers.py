"""Convolutions and Linears for inference: with the activation inside, fixed weights, and no copy for the padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.inference import onednn
from maxattn.inference.fold import Weights
from maxattn.nn.conv import Conv2d, same_padding


class Fused(nn.Module):
    """Weights, fixed from now on, and an activation; what oneDNN packs of them is kept beside them.

    In-place changes of the weights by other ways than `load_state_dict` and `to` go unseen.
    """

    def __init__(self, weights: Weights, act: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = _fixed(weights.weight)
        self.bias = None if weights.bias is None else _fixed(weights.bias)
        self.act = nn.Identity() if act is None else act
        self._post = onednn.post_op(self.act)
        self._packed: dict[Any, Tensor] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Fused:
        self._packed = {}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> Mapping[str, Any]:
        """For copies: packed weights cannot be copied, and are packed again."""
        return {**super().__getstate__(), "_packed": {}}  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


class FusedLinear(Fused):
    """A Linear over the last dimension, and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        if self._post is not None and onednn.serves(x, self.weight):
            if () not in self._packed:
                self._packed[()] = onednn.pack_linear(self.weight)
            return onednn.linear(x, self._packed[()], self.bias, self._post)
        if x.device.type == "cpu" and x.ndim == 4 and torch.compiler.is_compiling():
            # As a convolution the compiler gives it to oneDNN; as a Linear to MKL, which on some processors is half
            # as fast.
            y = F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        else:
            y = F.linear(x, self.weight, self.bias)
        return self.act(y)


class FusedConv2d(Fused):
    """A convolution of channels-last `(B, in, H, W)` and an activation; padded as the one it is made from."""

    def __init__(self, conv: nn.Conv2d, weights: Weights, act: nn.Module | None = None) -> None:
        super().__init__(weights, act)
        self.stride, self.groups = list(conv.stride), conv.groups
        self.padding = [int(side) for side in conv.padding]
        self.pads_by_size = isinstance(conv, Conv2d) and conv.pads_by_size

    def forward(self, x: Tensor) -> Tensor:
        shifts, padding = self._padding(x)
        if self._post is not None and onednn.serves(x, self.weight):
            if shifts not in self._packed:
                weight = _shifted(self.weight, shifts)
                self._packed[shifts] = onednn.pack_convolution(weight, x, padding, self.stride, self.groups)
            packed = self._packed[shifts]
            y = onednn.convolution(x, packed, self.bias, padding, self.stride, self.groups, self._post)
            return y.contiguous(memory_format=torch.channels_last)
        weight = _shifted(self.weight, shifts)
        return self.act(F.conv2d(x, weight, self.bias, self.stride, padding, 1, self.groups))

    def _padding(self, x: Tensor) -> tuple[tuple[int, int], list[int]]:
        """By how much the kernel is shifted, and the padding of either side then."""
        if not self.pads_by_size:
            return (0, 0), self.padding
        sides = zip(x.shape[2:], self.weight.shape[2:], self.stride, strict=True)
        (top, bottom), (left, right) = (same_padding(*side) for side in sides)
        return (bottom - top, right - left), [bottom, right]


def _shifted(weight: Tensor, shifts: tuple[int, int]) -> Tensor:
    """The kernel with rows and columns of zeros before it.

    It does with equal padding on both sides what the kernel alone does with so many pixels less at the top and left.
    """
    return F.pad(weight, (shifts[1], 0, shifts[0], 0)) if any(shifts) else weight


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
