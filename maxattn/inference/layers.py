"""Convolutions and Linears for inference: with the activation inside, fixed weights, and no copy for the padding.

On the CPU oneDNN computes them, on a GPU the kernels of `maxattn.inference.gpu`, elsewhere PyTorch's usual functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.inference import gpu, onednn
from maxattn.inference.fixed import Fixed, take_over
from maxattn.inference.fold import Weights
from maxattn.nn.conv import Conv2d, same_padding
from maxattn.nn.gpu import name_of


class Fused(Fixed):
    """Weights, fixed from now on, and an activation; what oneDNN makes of them at the first call is kept beside them.

    In-place changes of the weights by other ways than `load_state_dict` and `to` go unseen.
    """

    def __init__(self, weights: Weights, act: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = _fixed(weights.weight)
        self.bias = None if weights.bias is None else _fixed(weights.bias)
        self.act = nn.Identity() if act is None else act
        self._post = onednn.post_op(self.act)
        self._gpu_act = name_of(self.act) or ""
        self._packed: dict[Any, Tensor] = {}

    def _changed(self) -> None:
        super()._changed()
        self._packed = {}

    def __getstate__(self) -> Mapping[str, Any]:
        """For copies: packed weights cannot be copied, and are packed again."""
        return {**super().__getstate__(), "_packed": {}}  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


class FusedLinear(Fused):
    """A Linear over the last dimension, and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        if self._gpu_act and gpu.serves(x, self.weight):
            return gpu.pointwise(x, self.weight, self.bias, self._gpu_act)
        if self._post is not None and onednn.serves(x, self.weight):
            if () not in self._packed:
                self._packed[()] = onednn.pack_linear(self.weight)
            return onednn.linear(x, self._packed[()], self.bias, self._post)
        if x.device.type == "cpu" and x.ndim == 4 and torch.compiler.is_compiling():
            # As a convolution the compiler gives it to oneDNN; as a Linear to MKL, which on some processors is half
            # as fast. An activation that oneDNN knows becomes part of it if nothing stands between.
            y = F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias)
            if self._post is not None:
                return self.act(y).permute(0, 2, 3, 1)
            y = y.permute(0, 2, 3, 1)
        else:
            y = F.linear(x, self.weight, self.bias)
        return self.act(y)

    def after_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`self(norm(x))`, where the kernels of a GPU serve."""
        how = gpu.normed_by(norm)
        if how is None or not self._gpu_act:
            return self(norm(x))
        return gpu.after_norm(x, self.weight, self.bias, self._gpu_act, *how)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`, where the kernels of a GPU serve."""
        if not self._gpu_act:
            return residual + self(x)
        return gpu.pointwise(x, self.weight, self.bias, self._gpu_act, residual=residual)

    def added_to_mlp(self, x: Tensor, norm: nn.Module, fc1: FusedLinear) -> Tensor:
        """`x + self(fc1(norm(x)))`, where the kernels of a GPU serve; this one has no activation."""
        how = gpu.normed_by(norm)
        if how is None or not fc1._gpu_act or not gpu.is_narrow(x.shape[-1]):
            return self.added_to(x, fc1.after_norm(norm, x))
        return gpu.mlp(x, fc1.weight, fc1.bias, self.weight, self.bias, fc1._gpu_act, *how)


class FusedConv2d(Fused):
    """A convolution of channels-last `(B, in, H, W)` and an activation; padded as the one it is made from.

    `laid_out` are its weights as the kernel of a GPU reads them, where that is not how they lie: a buffer that no file
    holds, so that a compiler's graph takes it and does not make it in every call.
    """

    laid_out: Tensor

    def __init__(self, conv: nn.Conv2d, weights: Weights, act: nn.Module | None = None) -> None:
        super().__init__(weights, act)
        self.stride, self.groups = list(conv.stride), conv.groups
        self.padding = [int(side) for side in conv.padding]
        self.pads_by_size = isinstance(conv, Conv2d) and conv.pads_by_size
        self.gpu_kernel = gpu.kernel_for(self.weight, self.stride, self.groups) if self._gpu_act else None
        self._lay_out()

    def _changed(self) -> None:
        super()._changed()
        self._lay_out()

    def _lay_out(self) -> None:
        if self.gpu_kernel == "depthwise":
            self._buffer(self.weight[:, 0].permute(1, 2, 0))
        elif self.gpu_kernel == "convolution":
            self._buffer(self.weight.permute(0, 2, 3, 1))

    def _buffer(self, weight: Tensor) -> None:
        self.register_buffer("laid_out", weight.detach().clone(memory_format=torch.contiguous_format), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gpu_kernel is not None and gpu.serves(x, self.weight):
            return self._on_gpu(x).permute(0, 3, 1, 2)
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

    def pointwise(self, x_BHWC: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """One of 1x1 on a GPU, from NHWC to NHWC: `residual + self(x * gate)`, with a `gate (B, in)`."""
        return gpu.pointwise(
            x_BHWC, self.weight.flatten(1), self.bias, self._gpu_act, gate=gate, residual=residual
        )  # fmt: skip

    def depthwise(self, x_BHWC: Tensor, *, pooled: bool) -> tuple[Tensor, Tensor | None]:
        """A depthwise one on a GPU, from NHWC to NHWC; and, if `pooled`, its mean `(B, out)` over pixels."""
        sides = self._sides(*x_BHWC.shape[1:3])
        return gpu.depthwise(x_BHWC, self.laid_out, self.bias, self._gpu_act, self.stride[0], sides, pooled=pooled)

    def _on_gpu(self, x: Tensor) -> Tensor:
        """The result in NHWC."""
        if self.gpu_kernel == "pointwise":
            return self.pointwise(x.permute(0, 2, 3, 1))
        if self.gpu_kernel == "depthwise":
            return self.depthwise(x.permute(0, 2, 3, 1), pooled=False)[0]
        return gpu.convolution(x, self.laid_out, self.bias, self._gpu_act, self.stride[0], self._sides(*x.shape[2:]))

    def _sides(self, *size: int) -> list[int]:
        """The padding at the top, the bottom, the left and the right."""
        if not self.pads_by_size:
            return [self.padding[0], self.padding[0], self.padding[1], self.padding[1]]
        (top, bottom), (left, right) = (
            same_padding(*side) for side in zip(size, self.weight.shape[2:], self.stride, strict=True)
        )
        return [top, bottom, left, right]

    def _padding(self, x: Tensor) -> tuple[tuple[int, int], list[int]]:
        """By how much the kernel is shifted, and the padding of either side then."""
        if not self.pads_by_size:
            return (0, 0), self.padding
        top, bottom, left, right = self._sides(*x.shape[2:])
        return (bottom - top, right - left), [bottom, right]


class FusedAvgPool2d(nn.AvgPool2d):
    """Average pooling of channels-last `(B, C, H, W)`; those of `Shortcut` by a kernel of ours on a GPU."""

    def __init__(self, pool: nn.AvgPool2d) -> None:
        take_over(self, pool)
        sizes = (pool.kernel_size, pool.stride, pool.padding)
        how = (*sizes, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)
        self.fuses = how in ((2, 2, 0, True, False, None), (3, 2, 1, False, True, None))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fuses and gpu.serves(x, x)):
            return super().forward(x)
        sizes = (self.kernel_size, self.stride, self.padding)
        return gpu.pool(x.permute(0, 2, 3, 1), *sizes, self.count_include_pad).permute(0, 3, 1, 2)  # type: ignore[arg-type]


def _shifted(weight: Tensor, shifts: tuple[int, int]) -> Tensor:
    """The kernel with rows and columns of zeros before it.

    It does with equal padding on both sides what the kernel alone does with so many pixels less at the top and left.
    """
    return F.pad(weight, (shifts[1], 0, shifts[0], 0)) if any(shifts) else weight


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
