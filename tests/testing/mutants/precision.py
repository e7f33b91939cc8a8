"""Precision: sums, products and exponentials that are coarser than the operator promises."""

from __future__ import annotations

import torch
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem

HALF = (torch.float16, torch.bfloat16)


class _Rounded(torch.autograd.Function):
    """Rounded, with the gradient of what is not."""

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x` with a mantissa of so many bits, in fp32: 11 is TF32, 8 is bf16."""
    return x if x.dtype == torch.float64 else _Rounded.apply(x, bits)


@mutant()
class SoftmaxInBf16(Steps):
    """the softmax runs in bf16 if qkv is bf16 or fp16"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        dtype = torch.bfloat16 if problem.dtype in HALF else logits.dtype
        shifted = (logits - logits.amax(-1, keepdim=True)).to(dtype)
        weights = shifted.exp()
        return (weights / weights.sum(-1, keepdim=True, dtype=dtype)).to(logits.dtype)


@mutant()
class LogitsInFp16(Steps):
    """logits are stored in fp16 where qkv is: those above 65,504 are infinite"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        logits = super().logits(q, k, bias, problem)
        return logits.half().to(logits.dtype) if problem.dtype == torch.float16 else logits


@mutant()
class UnscaledLogitsInHalf(Steps):
    """q k^T is rounded to the dtype of qkv before it is scaled, as a matmul of q and k returns it"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        product = (q @ k.transpose(-2, -1)).to(problem.dtype).to(q.dtype) * problem.softmax_scale
        return product if bias is None else product + bias.to(product.dtype)


@mutant()
class NoMaximumSubtracted(Steps):
    """exponentials are taken of the logits as they are, and large ones overflow"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        weights = logits.exp()
        return weights / weights.sum(-1, keepdim=True)


@mutant()
class MaximumOfTheWindow(Steps):
    """the largest logit of the whole window is subtracted, and rows far below it become 0 / 0"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        weights = (logits - logits.amax((-2, -1), keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)


@mutant()
class MaximumOfTheFirstTile(Steps):
    """the row's maximum is that of its first 32 keys"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        weights = (logits - logits[..., :32].amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)


@mutant()
class LogitsClamped(Steps):
    """logits are clamped to [-50, 50] against overflow"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().logits(q, k, bias, problem).clamp(-50, 50)


@mutant()
class SoftmaxInBaseTwo(Steps):
    """exp2 is taken of logits that were not multiplied by log2(e)"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        return (logits * 0.6931471805599453).softmax(-1)


@mutant()
class SoftmaxOffByOne(Steps):
    """1 is added to the sum of exponentials"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        maximum = logits.amax(-1, keepdim=True)
        weights = (logits - maximum).exp()
        return weights / (weights.sum(-1, keepdim=True) + (-maximum).exp())


@mutant()
class EpsilonInTheDenominator(Steps):
    """1e-5 is added to the sum of exponentials"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return weights / (weights.sum(-1, keepdim=True) + 1e-5)


@mutant()
class FastExponential(Steps):
    """exp(x) is (1 + x / 1024) ** 1024"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        shifted = (logits - logits.amax(-1, keepdim=True)).clamp(min=-1000)
        weights = (1 + shifted / 1024) ** 1024
        return weights / weights.sum(-1, keepdim=True)


@mutant()
class SmallWeightsDropped(Steps):
    """weights below 1e-3 are skipped"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        weights = logits.softmax(-1)
        return weights * (weights >= 1e-3)


@mutant()
class Tf32Logits(Steps):
    """fp32 q and k are multiplied in TF32"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().logits(rounded(q, 11), rounded(k, 11), bias, problem)


@mutant()
class Tf32Values(Steps):
    """fp32 weights and values are multiplied in TF32"""

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return super().values(rounded(weights, 11), rounded(v, 11), problem)


@mutant()
class Tf32Gradients(Explicit):
    """only the backward pass of fp32 multiplies in TF32"""

    def q_gradient(self, grad_logits: Tensor, k: Tensor, problem: Problem) -> Tensor:
        return super().q_gradient(rounded(grad_logits, 11), rounded(k, 11), problem)

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        return super().k_gradient(rounded(grad_logits, 11), rounded(q, 11), problem)

    def v_gradient(self, weights: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        return super().v_gradient(rounded(weights, 11), rounded(grad_out, 11), problem)


@mutant()
class WeightsInFp8(Steps):
    """weights are rounded to fp8 (e4m3) for the product with the values"""

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        coarse = weights.detach().to(torch.float32).to(torch.float8_e4m3fn).to(weights.dtype)
        return super().values(weights + (coarse - weights.detach()), v, problem)


@mutant()
def fp32_computed_in_bf16(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """fp32 inputs are cast to bf16"""
    cast = torch.bfloat16 if problem.dtype == torch.float32 else problem.dtype
    return exact(qkv.to(cast), bias, problem).to(problem.dtype)


@mutant()
def fp64_computed_in_fp32(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """fp64 inputs are cast to fp32"""
    cast = torch.float32 if problem.dtype == torch.float64 else problem.dtype
    return exact(qkv.to(cast), bias, problem).to(problem.dtype)


@mutant()
class Fp64SoftmaxInFp32(Steps):
    """for fp64, only the softmax runs in fp32"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        return logits.float().softmax(-1).to(logits.dtype)


@mutant()
def fp16_through_bf16(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """fp16 inputs are cast to bf16, the only half precision that was tried"""
    cast = torch.bfloat16 if problem.dtype == torch.float16 else problem.dtype
    return exact(qkv.to(cast), bias, problem).to(problem.dtype)


@mutant()
class OutputOfFp16Scaled(Steps):
    """fp16 outputs are divided by 16 against overflow and never multiplied again"""

    def result(self, out: Tensor, problem: Problem) -> Tensor:
        return super().result(out / 16 if problem.dtype == torch.float16 else out, problem)


@mutant()
def bias_rounded_to_bf16(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is cast to bf16, whatever the dtype of qkv"""
    return exact(qkv, None if bias is None else bias.to(torch.bfloat16), problem)


@mutant()
def bias_through_fp16(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is cast to fp16, whatever the dtype of qkv: -1e5 becomes -inf"""
    return exact(qkv, None if bias is None else bias.to(torch.float16), problem)


@mutant()
class ValuesSummedInHalf(Steps):
    """the output is summed over tiles of 16 keys in the dtype of qkv"""

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        out = None
        for w, part in zip(weights.split(16, -1), v.split(16, -2), strict=True):
            out = (w @ part if out is None else out + w @ part).to(problem.dtype).to(v.dtype)
        return out


@mutant(**EAGER)
class DenominatorSummedInHalf(Steps):
    """exponentials are summed one by one in the dtype of qkv where that is bf16 or fp16"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        if problem.dtype not in HALF:
            return super().softmax(logits, problem)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        total = torch.zeros_like(weights[..., 0])
        for weight in weights.unbind(-1):
            total = (total + weight).to(problem.dtype).to(total.dtype)
        return weights / total[..., None]


@mutant()
class LogSumExpInBf16(Explicit):
    """the log-sum-exp that the backward pass computes weights from is kept in bf16"""

    def recomputed_weights(self, q: Tensor, k: Tensor, bias: Tensor | None, inside: Tensor, problem: Problem) -> Tensor:
        logits = self.masked(self.logits(q, k, bias, problem), inside)
        return (logits - logits.logsumexp(-1, keepdim=True).bfloat16().to(logits.dtype)).exp()


@mutant()
class LogSumExpWithoutMaximum(Explicit):
    """the backward pass computes the weights again without subtracting a maximum"""

    def recomputed_weights(self, q: Tensor, k: Tensor, bias: Tensor | None, inside: Tensor, problem: Problem) -> Tensor:
        weights = self.masked(self.logits(q, k, bias, problem), inside).exp()
        return weights / weights.sum(-1, keepdim=True)
