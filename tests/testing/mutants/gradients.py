"""The gradients of q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from testing.mutants.base import exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem


def with_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """`x`, with a gradient that is multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


@mutant()
class DkAndDvSwapped(Explicit):
    """the gradient's k and v are stored in each other's place"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().backward(ctx, grad_out)
        return grad_qkv[:, :, :, [0, 2, 1]], grad_bias


@mutant()
class DqNotScaled(Explicit):
    """the gradient of q lacks the scale"""

    def q_gradient(self, grad_logits: Tensor, k: Tensor, problem: Problem) -> Tensor:
        return grad_logits @ k


@mutant()
class DkNotScaled(Explicit):
    """the gradient of k lacks the scale"""

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        return grad_logits.transpose(-2, -1) @ q


@mutant()
class DkNotTransposed(Explicit):
    """the gradient of k is computed from the logits' gradient without transposing it"""

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        return grad_logits @ q * problem.softmax_scale


@mutant()
class DeltaMissing(Explicit):
    """the gradient of the logits is P dP without the rows' delta"""

    def logits_gradient(self, weights: Tensor, grad_weights: Tensor) -> Tensor:
        return weights * grad_weights


@mutant()
class DeltaOfTheMean(Explicit):
    """delta is the mean of P dP over the keys instead of the sum"""

    def logits_gradient(self, weights: Tensor, grad_weights: Tensor) -> Tensor:
        return weights * (grad_weights - (weights * grad_weights).mean(-1, keepdim=True))


@mutant()
class DkFromTheFirst32Queries(Explicit):
    """the gradient of k is written, not added, by the first tile of 32 queries"""

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        return super().k_gradient(grad_logits[..., :32, :], q[..., :32, :], problem)


@mutant()
class DvWithoutTheLastQuery(Explicit):
    """the loop over queries stops one early for the gradient of v"""

    def v_gradient(self, weights: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        return super().v_gradient(weights[..., :-1, :], grad_out[..., :-1, :], problem)


@mutant()
class DqOfTheLastHeadUnwritten(Explicit):
    """the gradient of q is not written for the last of several heads"""

    def q_gradient(self, grad_logits: Tensor, k: Tensor, problem: Problem) -> Tensor:
        gradient = super().q_gradient(grad_logits, k, problem)
        if gradient.shape[2] > 1:
            gradient[:, :, -1] = torch.empty_like(gradient[:, :, -1])
        return gradient


@mutant()
class GradientWithoutTheBias(Explicit):
    """the backward pass computes the weights again without the bias"""

    def recomputed_weights(self, q: Tensor, k: Tensor, bias: Tensor | None, inside: Tensor, problem: Problem) -> Tensor:
        return super().recomputed_weights(q, k, None, inside, problem)


@mutant()
class GradientWithTheDefaultScale(Explicit):
    """the backward pass takes head_dim ** -0.5 for the scale"""

    def recomputed_weights(self, q: Tensor, k: Tensor, bias: Tensor | None, inside: Tensor, problem: Problem) -> Tensor:
        logits = q @ k.transpose(-2, -1) * problem.head_dim**-0.5
        logits = logits if bias is None else logits + bias.to(logits.dtype)
        return self.softmax(self.masked(logits, inside), problem)


@mutant()
def gradient_in_blocks_for_the_grid(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the backward pass is that of blocks, on both axes"""
    out, block = exact(qkv, bias, problem), exact(qkv, bias, problem, axis="block")
    return (out.detach() + (block - block.detach())).contiguous()


@mutant()
class GradientOfTheFirstImageOnly(Steps):
    """the gradient of qkv is 0 for all images but the first"""

    def qkv_windows(self, qkv: Tensor, problem: Problem) -> Tensor:
        first = torch.arange(qkv.shape[0], device=qkv.device) == 0
        return super().qkv_windows(with_gradient(qkv, first.view(-1, 1, 1, 1, 1, 1).to(qkv.dtype)), problem)


@mutant()
class DvWithoutTheLastGroup(Steps):
    """the last group adds nothing to the gradient of v"""

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        last = torch.arange(v.shape[1], device=v.device) == v.shape[1] - 1
        return weights @ with_gradient(v, (~last).view(-1, 1, 1, 1).to(v.dtype))


@mutant()
class LastRowOfDkOff(Explicit):
    """the gradient of the last key of each group is that of the one before it"""

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        gradient = super().k_gradient(grad_logits, q, problem)
        return torch.cat((gradient[..., :-1, :], gradient[..., -2:-1, :]), -2) if gradient.shape[-2] > 1 else gradient


@mutant()
def gradient_off_by_half_a_percent(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """all gradients of qkv are 0.5 % too large"""
    return exact(with_gradient(qkv, 1.005), bias, problem)


@mutant()
class NoQkvGradientWithoutABiasGradient(Explicit):
    """the fused backward pass runs only if the bias needs a gradient too, else dq is left 0"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().backward(ctx, grad_out)
        if grad_bias is not None and not ctx.needs_input_grad[1]:
            grad_qkv[:, :, :, 0] = 0
        return grad_qkv, grad_bias


@mutant()
class NoQkvGradientWithoutABias(Explicit):
    """the backward pass without bias forgets the gradient of k"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().backward(ctx, grad_out)
        if grad_bias is None:
            grad_qkv[:, :, :, 1] = 0
        return grad_qkv, grad_bias
