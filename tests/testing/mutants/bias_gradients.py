"""The gradient of the bias: a sum over all groups of all images."""

from __future__ import annotations

from typing import Any

import torch
from testing.mutants.base import exact, mutant
from testing.mutants.gradients import with_gradient
from testing.mutants.steps import Explicit
from torch import Tensor

from maxattn import Problem


@mutant()
class DbiasWithoutTheLastGroup(Explicit):
    """the last group of each image is left out of the bias gradient"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits[:, :-1], problem)


@mutant()
class DbiasOfTheFirstImage(Explicit):
    """the bias gradient is summed over groups, not over images"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits[:1], problem)


@mutant()
class DbiasOfTheFirstGroup(Explicit):
    """the bias gradient is that of each image's first group"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits[:, :1], problem)


@mutant()
class DbiasIsTheMean(Explicit):
    """the bias gradient is divided by the number of groups"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits, problem) / max(grad_logits.shape[1], 1)


@mutant()
class DbiasOfFullGroups(Explicit):
    """groups that the image does not fill are left out of the bias gradient"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        full = self.inside_windows(problem.height, problem.width, problem, grad_logits.device).all(-1)
        return super().bias_gradient(grad_logits[:, full], problem)


@mutant()
class DbiasOfAtMost256Windows(Explicit):
    """partial sums of the bias gradient are kept for 256 programs, and more windows are not added"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return grad_logits.flatten(0, 1)[:256].sum(0)


@mutant()
class DbiasTransposed(Explicit):
    """the bias gradient is stored key first"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits, problem).transpose(1, 2)


@mutant()
class DbiasScaled(Explicit):
    """the bias gradient is multiplied by the scale, as that of q k^T is"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits, problem) * problem.softmax_scale


@mutant()
class DbiasOfTheNextHead(Explicit):
    """the bias gradient is stored one head further"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits, problem).roll(1, 0)


@mutant()
class DbiasOfHeadsAbove8Zero(Explicit):
    """the bias gradient is written for 8 heads"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        gradient = super().bias_gradient(grad_logits, problem)
        gradient[8:] = 0
        return gradient


@mutant()
class DbiasLastRowOff(Explicit):
    """the last row of the bias gradient repeats the one before it"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        gradient = super().bias_gradient(grad_logits, problem)
        return torch.cat((gradient[:, :-1], gradient[:, -2:-1]), 1) if gradient.shape[1] > 1 else gradient


@mutant()
class DbiasOfRowsAbove128Zero(Explicit):
    """the bias gradient is stored from one tile of 128 queries"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        gradient = super().bias_gradient(grad_logits, problem)
        gradient[:, 128:] = 0
        return gradient


@mutant()
class DbiasSummedInBf16(Explicit):
    """the bias gradient is summed window by window in bf16"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return _summed(grad_logits, torch.bfloat16)


@mutant()
class DbiasSummedInTheDtypeOfQkv(Explicit):
    """the bias gradient is summed window by window in the dtype of qkv"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return _summed(grad_logits, problem.dtype)


def _summed(grad_logits: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(grad_logits.shape[2:], dtype=dtype, device=grad_logits.device)
    for window in grad_logits.flatten(0, 1):
        total = (total + window).to(dtype)
    return total


@mutant()
class DbiasThroughFp16(Explicit):
    """the bias gradient is stored in fp16 before it is cast to the dtype of the bias: large sums are infinite"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        return super().bias_gradient(grad_logits, problem).half()


@mutant()
class NoDbiasIfOnlyTheBiasNeedsOne(Explicit):
    """the backward pass returns early if qkv needs no gradient"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return super().backward(ctx, grad_out) if ctx.needs_input_grad[0] else (None, None)


@mutant()
class ZeroDbiasIfOnlyTheBiasNeedsOne(Explicit):
    """the bias gradient is 0 if qkv needs none"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad_qkv, grad_bias = super().backward(ctx, grad_out)
        return grad_qkv, grad_bias if ctx.needs_input_grad[0] or grad_bias is None else torch.zeros_like(grad_bias)


@mutant()
def output_detached_if_only_the_bias_needs_a_gradient(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the path for inference is taken if qkv needs no gradient"""
    return exact(qkv, bias if problem.requires_grad or bias is None else bias.detach(), problem)


@mutant()
class DbiasBufferNotCleared(Explicit):
    """the bias gradient is added to a buffer that is never cleared"""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        gradient = super().bias_gradient(grad_logits, problem)
        key = problem, gradient.shape
        self.buffers[key] = self.buffers.get(key, 0) + gradient
        return self.buffers[key]


@mutant()
class DbiasDoubledByTheAutotuner(Explicit):
    """the first backward pass of each kind runs twice, to be timed, and adds to the bias gradient twice"""

    def __init__(self) -> None:
        self.tuned: set[Problem] = set()

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        gradient = super().bias_gradient(grad_logits, problem)
        first = problem not in self.tuned
        self.tuned.add(problem)
        return gradient * 2 if first else gradient


@mutant()
def dbias_halved_with_a_fp32_bias(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the gradient of an fp32 bias beside a coarser qkv is halved"""
    mixed = bias is not None and bias.dtype == torch.float32 != qkv.dtype
    return exact(qkv, with_gradient(bias, 0.5) if mixed else bias, problem)


@mutant()
def dbias_zero_for_the_grid(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias gets no gradient from the grid axis"""
    return exact(qkv, with_gradient(bias, 0.0) if bias is not None and problem.axis == "grid" else bias, problem)
