"""How a backward pass fits into autograd: what is saved, and what happens when it is used again."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit
from torch import Tensor

from maxattn import Problem

Saved = tuple[Tensor, Tensor | None, Tensor | None]


@mutant()
class InputsSavedUnseen(Explicit):
    """inputs are kept as attributes: a change in place before the backward pass goes unnoticed"""

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        ctx.kept = qkv.detach(), None if bias is None else bias.detach(), drawn

    def saved(self, ctx: Any) -> Saved:
        return ctx.kept


@mutant()
class BiasSavedUnseen(Explicit):
    """the bias is saved through .data: an optimizer's step before the backward pass goes unnoticed"""

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        ctx.save_for_backward(qkv, None if bias is None else bias.data, drawn)


@mutant()
class OutputSavedUnseen(Explicit):
    """delta comes from the output, kept as an attribute: an operation in place on the output spoils the gradients"""

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        super().save(ctx, qkv, bias, drawn, out)
        ctx.output = out.detach()

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        for_this = copy(self)
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        delta = (ctx.output.to(wide) * grad_out.to(wide)).sum(-1, keepdim=True)
        inside = self.inside_windows(*grad_out.shape[1:3], ctx.problem, grad_out.device)
        for_this.delta = self.incoming(delta, inside, ctx.problem)
        return Explicit.backward(for_this, ctx, grad_out)

    def logits_gradient(self, weights: Tensor, grad_weights: Tensor) -> Tensor:
        return weights * (grad_weights - self.delta)


@mutant()
class SavedCopyScaledInPlace(Explicit):
    """the backward pass scales its own copy of qkv in place: the second one, with retain_graph, is wrong"""

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        super().save(ctx, qkv.clone(), bias, drawn, out)

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        saved = qkv, *_ = self.saved(ctx)
        gradients = self.gradients(*saved, grad_out, ctx.problem)
        qkv.data.mul_(ctx.problem.softmax_scale)
        return gradients


@mutant()
class SavedTensorsUnpackedTwice(Explicit):
    """the backward pass asks for ctx.saved_tensors twice, which activation checkpointing refuses"""

    def saved(self, ctx: Any) -> Saved:
        return ctx.saved_tensors[0], *ctx.saved_tensors[1:]


@mutant()
class FreedByTheFirstBackwardPass(Explicit):
    """what was kept is freed by the first backward pass: the second one, with retain_graph, fails"""

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        super().save(ctx, qkv, bias, drawn, out)
        ctx.workspace = [drawn]

    def saved(self, ctx: Any) -> Saved:
        return *ctx.saved_tensors[:2], ctx.workspace.pop()


@mutant()
class LatestForwardPassOnly(Explicit):
    """the backward pass uses what the latest forward pass of that shape left on the instance"""

    def __init__(self) -> None:
        self.latest: dict[Any, Saved] = {}

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        super().save(ctx, qkv, bias, drawn, out)
        self.latest[qkv.shape, ctx.problem] = qkv, bias, drawn

    def saved(self, ctx: Any) -> Saved:
        return self.latest[ctx.saved_tensors[0].shape, ctx.problem]


class _WithConstantWeights(torch.autograd.Function):
    """A backward pass of differentiable operations, but on weights that were saved as a constant."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        weights = (q @ k.transpose(-2, -1) * scale + bias).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad_weights = grad @ v.transpose(-2, -1)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grad_q, grad_k = grad_logits @ k * ctx.scale, grad_logits.transpose(-2, -1) @ q * ctx.scale
        return grad_q, grad_k, weights.transpose(-2, -1) @ grad, grad_logits, None


class ConstantWeights(Explicit):
    """Right forward and backward, wrong in the second derivative."""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if problem.dropout_p:
            return exact(qkv, bias, problem)
        (B, H, W), N, h = qkv.shape[:3], problem.tokens, problem.heads
        q, k, v = self.qkv_windows(qkv, problem).flatten(1, 2)
        inside = self.inside_windows(H, W, problem, qkv.device)
        table = q.new_zeros(h, N, N) if bias is None else bias.to(q.dtype)
        table = table.masked_fill(~inside[:, None, None, :], torch.finfo(q.dtype).min / 2).repeat(B, 1, 1, 1)
        out = _WithConstantWeights.apply(q, k, v, table, problem.softmax_scale)
        out = out.unflatten(0, (B, inside.shape[0])).transpose(2, 3)
        return self.result(self.to_image(out, H, W, problem), problem)


@mutant(**EAGER, double_backward=True)
class DoubleBackwardThroughConstantWeights(ConstantWeights):
    """the second derivative, which it declares, takes the saved weights for constants"""


@mutant()
def gradient_always_prepared(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a gradient is prepared under no_grad too, and evaluation keeps the memory of training"""
    with torch.enable_grad():
        return exact(qkv, bias, problem)


@mutant(**EAGER)
class SilentlyWrongDoubleBackward(ConstantWeights):
    """it declares no second derivative, but gives a wrong one: once_differentiable is missing"""
