"""The scale: missing, twice, another one."""

from __future__ import annotations

import math

from testing.mutants.base import exact, mutant
from testing.mutants.steps import Steps
from torch import Tensor

from maxattn import Problem


@mutant()
def scale_missing(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the logits are not scaled"""
    return exact(qkv, bias, problem, scale=1.0)


@mutant()
def scale_twice(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """q is scaled, and then the logits are"""
    return exact(qkv, bias, problem, scale=problem.softmax_scale**2)


@mutant()
def scale_argument_ignored(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the scale is always head_dim ** -0.5"""
    return exact(qkv, bias, problem, scale=None)


@mutant()
def scale_of_zero_taken_for_none(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """`scale or head_dim ** -0.5`: a scale of 0 becomes the default"""
    return exact(qkv, bias, problem, scale=problem.scale or problem.head_dim**-0.5)


@mutant()
def scale_without_its_sign(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the scale is folded as a square root into q and k, so its sign is lost"""
    return exact(qkv, bias, problem, scale=abs(problem.softmax_scale))


@mutant()
def scale_of_the_padded_head_dim(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the default scale is that of head_dim padded to a multiple of 16"""
    padded = -(-problem.head_dim // 16) * 16
    return exact(qkv, bias, problem, scale=padded**-0.5 if problem.scale is None else problem.scale)


@mutant()
def scale_passed_in_bf16(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the scale reaches the kernel as bf16, also for fp32"""
    mantissa, exponent = math.frexp(problem.softmax_scale)
    return exact(qkv, bias, problem, scale=math.ldexp(round(mantissa * 2**8) / 2**8, exponent))


@mutant()
class ScaleAfterTheMaximum(Steps):
    """the largest unscaled logit is subtracted, which is the smallest scaled one if the scale is negative"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        if problem.softmax_scale >= 0:
            return logits.softmax(-1)
        smallest = logits.masked_fill(logits.isinf(), float("inf")).amin(-1, keepdim=True)
        weights = (logits - smallest).exp()
        return weights / weights.sum(-1, keepdim=True)
