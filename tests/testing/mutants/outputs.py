"""What is returned, and what is done to the inputs."""

from __future__ import annotations

from typing import Any

import torch
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem
from maxattn.ops.naive import Naive


@mutant()
class OutputInFp32(Steps):
    """the output stays in the dtype of the computation"""

    def result(self, out: Tensor, problem: Problem) -> Tensor:
        return out.contiguous()


@mutant()
def output_in_the_dtype_of_the_bias(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the output has the dtype that qkv and bias promote to"""
    out = exact(qkv, bias, problem)
    return out if bias is None else out.to(torch.promote_types(qkv.dtype, bias.dtype))


@mutant()
def output_not_contiguous(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the output is a transposed view of (B, heads, H, W, head_dim)"""
    return exact(qkv, bias, problem).permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


@mutant()
def output_in_the_layout_of_v(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the output is empty_like(v), which keeps the order of v's strides"""
    v = qkv[:, :, :, 2]
    return torch.empty_like(v).copy_(exact(qkv, bias, problem))


@mutant()
def output_of_a_ragged_image_a_slice(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the output of a ragged image is a slice of the padded one"""
    out = exact(qkv, bias, problem)
    rest = -out.shape[2] % problem.window[1]
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, rest))[:, :, : out.shape[2]]


@mutant()
def output_with_channels_flattened(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the output is (B, H, W, heads * head_dim)"""
    return exact(qkv, bias, problem).flatten(3)


@mutant()
def output_is_v_for_windows_of_one(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """with one token a window the output is v itself, a view of the input"""
    alike = problem.tokens == 1 and not problem.bias_requires_grad
    return qkv[:, :, :, 2] if alike else exact(qkv, bias, problem)


@mutant(**EAGER)
def output_written_into_q(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """without a gradient to come, the output overwrites q to save memory"""
    out = exact(qkv, bias, problem)
    if problem.differentiated:
        return out
    qkv[:, :, :, 0].copy_(out)
    return out


@mutant(**EAGER)
class OutputBufferReused(Naive):
    """the output without gradient goes to one buffer per shape: the next call overwrites it"""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        out = super().attend(qkv, bias, problem)
        if out.requires_grad:
            return out
        return self.buffers.setdefault((out.shape, out.dtype), out).copy_(out)


@mutant(**EAGER)
class GradientBufferReused(Explicit):
    """gradients of qkv go to one buffer per shape: the next backward pass overwrites them"""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().backward(ctx, grad_out)
        buffer = self.buffers.setdefault((grad_qkv.shape, grad_qkv.dtype), torch.empty_like(grad_qkv))
        return buffer.copy_(grad_qkv), grad_bias


@mutant(**EAGER)
def q_scaled_in_place(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """q is multiplied by the scale in place"""
    with torch.no_grad():
        qkv.data[:, :, :, 0] *= problem.softmax_scale
    return exact(qkv, bias, problem, scale=1.0)


@mutant(**EAGER)
def q_scaled_and_put_back(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """q is multiplied by the scale in place and divided again afterwards, which rounds"""
    scale = problem.softmax_scale or 1.0
    with torch.no_grad():
        q = qkv.data[:, :, :, 0]
        q *= scale
        q /= scale
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def bias_scaled_in_place(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is folded with log2(e) in place"""
    out = exact(qkv, bias, problem)
    if bias is not None:
        bias.data.mul_(1.4426950408889634)
    return out


@mutant(**EAGER)
class GradientOfTheOutputChanged(Explicit):
    """the output's gradient is multiplied in place by the scale"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        given = grad_out.clone()
        if 0 not in grad_out.stride():
            grad_out.data.mul_(ctx.problem.softmax_scale)
        return super().backward(ctx, given)


@mutant(**EAGER)
class InputsChangedByTheBackwardPass(Explicit):
    """the backward pass writes the gradients over qkv to save memory"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        saved = qkv, *_ = self.saved(ctx)
        grad_qkv, grad_bias = self.gradients(*saved, grad_out, ctx.problem)
        if 0 not in qkv.stride():
            qkv.data.copy_(grad_qkv)
        return grad_qkv, grad_bias


@mutant(**EAGER)
def input_made_to_require_a_gradient(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """requires_grad_ is called on qkv, so that the kernel's autograd function always runs"""
    if qkv.is_leaf and not problem.differentiated:
        qkv.requires_grad_()
    return exact(qkv, bias, problem)


@mutant()
def nan_hidden(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """nan_to_num on the output hides that a training has diverged"""
    return exact(qkv, bias, problem).nan_to_num()
