"""What compilers are told: operators that are not what they say, and code that does not trace as declared."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from testing.mutants.base import exact, mutant
from testing.mutants.operators import Operators
from torch import Tensor

from maxattn import Problem


@mutant()
class FakeWithDimsSwapped(Operators):
    """the operator's fake has heads and head_dim swapped"""

    def fake(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        return super().fake(qkv, bias, *groups).transpose(3, 4).contiguous()


@mutant()
class FakeOfBf16InFp16(Operators):
    """the operator's fake takes all 16 bits for fp16"""

    def fake(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        out = super().fake(qkv, bias, *groups)
        return out.half() if qkv.dtype == torch.bfloat16 else out


@mutant()
class FakeContiguousKernelNot(Operators):
    """the operator returns (B, heads, H, W, head_dim) transposed, its fake says contiguous"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().attend(qkv, bias, problem).contiguous()

    def forward(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        return super().forward(qkv, bias, *groups).permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


@mutant()
class FakeOfTheBackwardPassTransposed(Operators):
    """the fake of the backward operator has heads before the 3"""

    def backward_fake(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        grad_qkv, grad_bias = super().backward_fake(*arguments)
        return grad_qkv.transpose(3, 4).contiguous().transpose(3, 4), grad_bias


@mutant()
class FakeOfFixedBatch(Operators):
    """the operator's fake turns the batch into a plain int, which fixes every traced graph to one batch"""

    def fake(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        return super().fake(qkv, bias, *groups).reshape(index(qkv.shape[0]), *qkv.shape[1:3], *qkv.shape[4:])


@mutant()
class FakeMissing(Operators):
    """the operator has no fake"""

    def register(self) -> None:
        self.operator.register_autograd(self.formula, setup_context=self.keep)


@mutant()
class FormulaMissing(Operators):
    """the operator has no formula for its gradient"""

    def register(self) -> None:
        self.operator.register_fake(self.fake)
        self.backward_operator.register_fake(self.backward_fake)


@mutant()
class FormulaReadsNumbers(Operators):
    """the formula of the gradient looks whether the incoming gradient is all 0, which cannot be traced"""

    def formula(self, ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        if grad_out.numel() and not grad_out.abs().max().item():
            return torch.zeros_like(ctx.saved_tensors[0]), *([None] * 5)
        return super().formula(ctx, grad_out)


@mutant()
class MutationNotDeclared(Operators):
    """the operator doubles q in place, for its own backward pass, and declares no mutation; it is given a copy"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().attend(qkv.clone(), bias, problem)

    def forward(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        out = super().forward(qkv, bias, *groups)
        qkv[:, :, :, 0] *= 2
        return out

    def backward(self, grad_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        qkv = torch.cat((qkv[:, :, :, :1] / 2, qkv[:, :, :, 1:]), 3)
        return super().backward(grad_out, qkv, *rest)


@mutant()
def asks_for_a_number(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the largest logit decides between two kernels, so a graph breaks there although compile is declared"""
    if qkv.numel() and qkv.detach().abs().max().item() > 1e4:
        return exact(qkv.contiguous(), bias, problem)
    return exact(qkv, bias, problem)


@mutant()
def compiled_without_bias(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the path for compilers forgets the bias"""
    return exact(qkv, None if problem.compiling else bias, problem)


@mutant()
def compiled_without_bias_gradient(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the path for compilers detaches the bias"""
    return exact(qkv, bias.detach() if problem.compiling and bias is not None else bias, problem)


@mutant()
def compiled_with_the_default_scale(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the path for compilers knows no scale but the default"""
    return exact(qkv, bias, problem, scale=None if problem.compiling else problem.scale)


@mutant()
def compiled_not_contiguous(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the path for compilers returns a transposed view"""
    out = exact(qkv, bias, problem)
    return out.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) if problem.compiling else out
