"""Dropout of attention weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem


def mask(weights: Tensor, dropout_p: float, *shared: int) -> Tensor:
    """1 for what is kept, one draw for all along the `shared` dimensions."""
    if not dropout_p:
        return torch.ones_like(weights)
    shape = [1 if dim - weights.ndim in shared else size for dim, size in enumerate(weights.shape)]
    return (torch.rand(shape, device=weights.device) >= dropout_p).to(weights.dtype)


BATCH, GROUPS, HEADS, QUERIES, KEYS = -5, -4, -3, -2, -1


@mutant()
def dropout_ignored(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """nothing is dropped"""
    return exact(qkv, bias, problem, dropout_p=0.0)


@mutant()
def dropout_ignored_without_gradient(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """nothing is dropped where no gradient is needed, as if that meant evaluation"""
    return exact(qkv, bias, problem, dropout_p=problem.dropout_p if problem.differentiated else 0.0)


@mutant()
class DropoutNotScaled(Steps):
    """weights that are kept are not divided by 1 - p"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p) if dropout_p else weights


@mutant()
class DropoutScaledByP(Steps):
    """weights that are kept are divided by p"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p) / dropout_p if dropout_p else weights


@mutant()
class DropoutKeepsP(Steps):
    """p is the probability of keeping, and the scale is 1 / p"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return F.dropout(weights, 1 - dropout_p) if dropout_p else weights


@mutant()
class DropoutRateHalved(Steps):
    """the random number is signed, so half as many weights as told are dropped; those kept are divided by 1 - p"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p / 2) / (1 - dropout_p)


@mutant()
class DropoutAlikeForHeads(Steps):
    """all heads drop the same weights"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p, HEADS) / (1 - dropout_p)


@mutant()
class DropoutAlikeForGroups(Steps):
    """all groups of an image drop the same weights"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p, GROUPS) / (1 - dropout_p)


@mutant()
class DropoutAlikeForImages(Steps):
    """all images of a batch drop the same weights"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p, BATCH) / (1 - dropout_p)


@mutant()
class DropoutOfWholeKeys(Steps):
    """a key is dropped for all queries of its group at once"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p, QUERIES) / (1 - dropout_p)


@mutant()
class DropoutOfWholeQueries(Steps):
    """a query drops all of its keys, or none"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights * mask(weights, dropout_p, KEYS) / (1 - dropout_p)


@mutant()
class DropoutInPairs(Steps):
    """two keys next to each other share one random number"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        N = weights.shape[-1]
        pairs = mask(weights[..., : (N + 1) // 2], dropout_p).repeat_interleave(2, -1)[..., :N]
        return weights * pairs / (1 - dropout_p)


@mutant()
class DropoutAlikeForTiles(Steps):
    """the counter starts anew for each tile of 32 keys"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        N = weights.shape[-1]
        first = mask(weights[..., :32], dropout_p)
        return weights * first.repeat(1, 1, 1, 1, -(-N // 32))[..., :N] / (1 - dropout_p)


@mutant()
class DropoutOfLogits(Steps):
    """logits are dropped instead of weights, to 0"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        finite = ~logits.isinf()
        return torch.where(finite, F.dropout(logits.where(finite, 0.0), problem.dropout_p), logits).softmax(-1)

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights


@mutant()
class DropoutBeforeTheSoftmax(Steps):
    """dropped logits are -inf, so the weights that are kept sum to 1 again"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        if not problem.dropout_p:
            return super().softmax(logits, problem)
        kept = mask(logits, problem.dropout_p).bool()
        return logits.masked_fill(~kept, torch.finfo(logits.dtype).min).softmax(-1)

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights


@mutant()
class DropoutRenormalised(Steps):
    """the weights that are kept are divided by their sum"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        if not dropout_p:
            return weights
        kept = weights * mask(weights, dropout_p)
        return kept / kept.sum(-1, keepdim=True).clamp(min=1e-20)


@mutant()
def dropout_of_the_output(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """elements of the output are dropped"""
    return F.dropout(exact(qkv, bias, problem, dropout_p=0.0), problem.dropout_p)


@mutant()
class DropoutOfValues(Steps):
    """elements of v are dropped"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return weights

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return weights @ F.dropout(v, problem.dropout_p)


@mutant()
class DropoutOfRaggedGroupsIgnored(Steps):
    """groups that the image does not fill drop nothing"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        full = (weights > 0).all(-1, keepdim=True).all(-2, keepdim=True)
        return torch.where(full, F.dropout(weights, dropout_p), weights)


@mutant()
class FreshMaskInTheBackwardPass(Explicit):
    """the backward pass draws a mask of its own"""

    def saved(self, ctx: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        qkv, bias, drawn = ctx.saved_tensors
        return qkv, bias, None if drawn is None else self.draw(drawn, ctx.problem.dropout_p)


@mutant()
class NoMaskForDp(Explicit):
    """the backward pass applies the mask for the gradient of v, not for that of the weights"""

    def gradients(
        self, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, grad_out: Tensor, problem: Problem
    ) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().gradients(qkv, bias, None, grad_out, problem)
        masked, _ = super().gradients(qkv, bias, drawn, grad_out, problem)
        return torch.cat((grad_qkv[:, :, :, :2], masked[:, :, :, 2:]), 3), grad_bias


@mutant()
class DvNotScaledByDropout(Explicit):
    """the gradient of v uses the mask without the factor 1 / (1 - p)"""

    def gradients(
        self, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, grad_out: Tensor, problem: Problem
    ) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().gradients(qkv, bias, drawn, grad_out, problem)
        grad_qkv[:, :, :, 2] *= 1 - problem.dropout_p
        return grad_qkv, grad_bias


@mutant()
def dbias_ignores_dropout(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias gradient is that without dropout"""
    if bias is None or not problem.dropout_p:
        return exact(qkv, bias, problem)
    out = exact(qkv, bias.detach(), problem)
    without = exact(qkv.detach(), bias, problem, dropout_p=0.0)
    return out + (without - without.detach())


@mutant(**EAGER)
class SeedFixed(Steps):
    """the mask comes from a generator with a seed written in the source: every call drops the same"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        generator = torch.Generator(weights.device).manual_seed(42)
        return _drop(weights, dropout_p, generator) if dropout_p else weights


@mutant(**EAGER)
class SeedIgnored(Steps):
    """the mask comes from a generator of its own that torch.manual_seed does not reach"""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.seed()

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return _drop(weights, dropout_p, self.generator) if dropout_p else weights


@mutant(**EAGER)
class SeedNotAdvanced(Steps):
    """the mask depends on torch.initial_seed() alone: every call after one manual_seed drops the same"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        generator = torch.Generator(weights.device).manual_seed(torch.initial_seed() + 1)
        return _drop(weights, dropout_p, generator) if dropout_p else weights


@mutant(**EAGER)
class SeedOfACounter(Steps):
    """the mask depends on the seed and on the number of calls so far, which manual_seed does not reset"""

    def __init__(self) -> None:
        self.calls = 0

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        self.calls += 1
        generator = torch.Generator(weights.device).manual_seed(torch.initial_seed() % 2**31 + self.calls)
        return _drop(weights, dropout_p, generator) if dropout_p else weights


@mutant(**EAGER)
class SeedOfAFewBits(Steps):
    """the mask is one of four: only two bits are drawn from PyTorch's generator"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        if not dropout_p:
            return weights
        seed = int(torch.randint(4, ()))
        return _drop(weights, dropout_p, torch.Generator(weights.device).manual_seed(seed))


def _drop(weights: Tensor, dropout_p: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout_p
    return weights * kept / (1 - dropout_p)


@mutant()
def dropout_ignores_the_scale(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the kernel for dropout is another one, and is always given the default scale"""
    return exact(qkv, bias, problem, scale=None if problem.dropout_p else problem.scale)


@mutant()
class DropoutWithoutMaximum(Steps):
    """the kernel for dropout is another one, and subtracts no maximum"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        if not problem.dropout_p:
            return super().softmax(logits, problem)
        weights = logits.exp()
        return weights / weights.sum(-1, keepdim=True)


@mutant()
class DropoutCountedByTile(Steps):
    """the counter of the random numbers starts again with every tile of 64 keys"""

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        random = torch.rand_like(weights[..., :64]).repeat(*(1,) * (weights.ndim - 1), -(-weights.shape[-1] // 64))
        return weights * (random[..., : weights.shape[-1]] >= dropout_p) / (1 - dropout_p)
