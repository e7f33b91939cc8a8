"""Addresses: the kernel reads other memory than the view that it was given.

`reread` is such a kernel's loads: elements are fetched by the strides it believes in, wrapped around where they would
leave the allocation. The gradient is that of the right loads.
"""

from __future__ import annotations

from typing import Any

import torch
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem


class _Reread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
        return _load(x, strides, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _load(
    x: Tensor, strides: tuple[int, ...], offset: int, *, shape: tuple[int, ...] | None = None, wrap: int | None = None
) -> Tensor:
    """What lies at the addresses of a tensor of these strides: `wrap` is the range of the kernel's integers."""
    shape = x.shape if shape is None else shape
    address = torch.full((1,) * x.ndim, offset, device=x.device)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = torch.arange(size, device=x.device) * stride
        address = address + steps.view([size if i == dim else 1 for i in range(x.ndim)])
    if wrap is not None:
        address = (address + wrap // 2) % wrap - wrap // 2
    memory = x.untyped_storage().nbytes() // x.element_size()
    flat = torch.as_strided(x.detach(), (memory,), (1,), 0)
    return flat[address % memory] if memory else x.detach().new_zeros(shape)


def reread(x: Tensor, strides: tuple[int, ...], offset: int | None = None) -> Tensor:
    return _Reread.apply(x, strides, x.storage_offset() if offset is None else offset)


def packed_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


@mutant(**EAGER)
def qkv_taken_for_contiguous(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """qkv is read as if it were contiguous"""
    return exact(reread(qkv, packed_strides(qkv.shape)), bias, problem)


@mutant(**EAGER)
def qkv_offset_ignored(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """qkv is read from the beginning of its allocation"""
    return exact(reread(qkv, qkv.stride(), 0), bias, problem)


@mutant(**EAGER)
def pixels_taken_for_adjacent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the stride from column to column is taken to be 3 * heads * head_dim"""
    strides = qkv.stride()
    return exact(reread(qkv, (*strides[:2], 3 * problem.heads * problem.head_dim, *strides[3:])), bias, problem)


@mutant(**EAGER)
def rows_taken_for_adjacent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the stride from row to row is taken to be W columns"""
    strides = qkv.stride()
    return exact(reread(qkv, (strides[0], strides[2] * qkv.shape[2], *strides[2:])), bias, problem)


@mutant(**EAGER)
def images_taken_for_adjacent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the stride from image to image is taken to be H rows"""
    strides = qkv.stride()
    return exact(reread(qkv, (strides[1] * qkv.shape[1], *strides[1:])), bias, problem)


@mutant(**EAGER)
def q_k_v_taken_for_adjacent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """k is taken to be heads * head_dim after q"""
    strides = qkv.stride()
    return exact(reread(qkv, (*strides[:3], problem.heads * problem.head_dim, *strides[4:])), bias, problem)


@mutant(**EAGER)
def heads_taken_for_adjacent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the stride from head to head is taken to be head_dim"""
    strides = qkv.stride()
    return exact(reread(qkv, (*strides[:4], problem.head_dim, strides[5])), bias, problem)


@mutant(**EAGER)
def width_stride_off_by_one(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the row stride is computed from W - 1 columns where the view is not contiguous"""
    strides = qkv.stride()
    if qkv.is_contiguous():
        return exact(qkv, bias, problem)
    return exact(reread(qkv, (strides[0], strides[1] - strides[2], *strides[2:])), bias, problem)


@mutant(**EAGER)
def sliced_heads_swapped(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the first two heads are swapped where qkv is a slice and has two or more"""
    if qkv.is_contiguous() or problem.heads < 2:
        return exact(qkv, bias, problem)
    order = [1, 0, *range(2, problem.heads)]
    return exact(qkv[:, :, :, :, order], bias, problem)


@mutant(**EAGER)
class OffsetsWrapAround(Steps):
    """offsets are computed in 32 bits"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        last = sum((size - 1) * stride for size, stride in zip(qkv.shape, qkv.stride(), strict=True))
        if qkv.numel() == 0 or last < 2**31:
            return super().attend(qkv, bias, problem)
        wrapped = _load(qkv, qkv.stride(), qkv.storage_offset(), wrap=2**32)
        return super().attend(wrapped + (qkv - qkv.detach()), bias, problem)


@mutant(**EAGER)
def bias_padded_to_128_taken_for_contiguous(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a bias is contiguous once it is padded to rows of a multiple of 128, but not where nothing is missing"""
    if bias is not None and problem.tokens % 128 == 0:
        bias = reread(bias, packed_strides(bias.shape))
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def bias_taken_for_contiguous(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is read as if it were contiguous"""
    return exact(qkv, None if bias is None else reread(bias, packed_strides(bias.shape)), problem)


@mutant(**EAGER)
def bias_heads_taken_for_adjacent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias of the next head is taken to be N rows further"""
    if bias is None:
        return exact(qkv, bias, problem)
    return exact(qkv, reread(bias, (bias.stride(1) * bias.shape[1], *bias.stride()[1:])), problem)


@mutant(**EAGER)
def bias_rows_taken_for_packed(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """rows of the bias are taken to be N apart, and its last stride to be 1"""
    if bias is None:
        return exact(qkv, bias, problem)
    return exact(qkv, reread(bias, (bias.stride(0), bias.shape[1], 1)), problem)


@mutant()
class GradientTakenForContiguous(Explicit):
    """the output's gradient is read as if it were contiguous"""

    def incoming(self, grad_out: Tensor, inside: Tensor, problem: Problem) -> Tensor:
        return super().incoming(
            _load(grad_out, packed_strides(grad_out.shape), grad_out.storage_offset()), inside, problem
        )


@mutant()
class GradientReadWithTheOutputsBatchStride(Explicit):
    """the output's gradient may be a slice, but its images are taken to be adjacent"""

    def incoming(self, grad_out: Tensor, inside: Tensor, problem: Problem) -> Tensor:
        strides = grad_out.stride()
        strides = (strides[1] * grad_out.shape[1], *strides[1:])
        return super().incoming(_load(grad_out, strides, grad_out.storage_offset()), inside, problem)


@mutant(**EAGER)
class MissingValuesTimesZero(Steps):
    """missing pixels are loaded from beyond the image and given the weight 0, which does not undo NaN"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        (P_h, P_w), (H, W) = problem.window, qkv.shape[1:3]
        padded = (qkv.shape[0], -(-H // P_h) * P_h, -(-W // P_w) * P_w, *qkv.shape[3:])
        loaded = _load(qkv, qkv.stride(), qkv.storage_offset(), shape=padded)
        loaded = torch.cat((torch.cat((qkv, loaded[:, :H, W:]), 2), loaded[:, H:]), 1)
        q, k, v = self.qkv_windows(loaded, problem)
        inside = self.inside_windows(H, W, problem, qkv.device)
        weights = self.softmax(self.masked(self.logits(q, k, bias, problem), inside), problem)
        out = (self.dropped(weights, problem.dropout_p) @ v).transpose(2, 3)
        return self.result(self.to_image(out, H, W, problem), problem)
