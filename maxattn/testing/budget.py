"""The error budget of a backend: how far from exact it may be, given how far the specification itself is.

Shapes: B batch, H x W pixels, h heads, d head_dim, N tokens of a window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Backend, Problem
from maxattn.ops.naive import Naive
from maxattn.testing.case import Inputs
from maxattn.testing.failure import require
from maxattn.testing.groups import by_group

NAIVE = Naive()
UNITS = {"max": 4, "2-norm": 1}
"""How many machine epsilons of rounding each norm grants beyond twice the error of `naive`."""
EXPONENTIAL = 8
"""Units of rounding in fp32 that an exponential may be off by: vectorised ones are good to 20 bits."""
UNITS_FP64 = 64
"""The same for fp64, where nothing is exact enough to measure the error of `naive`."""


class Share(NamedTuple):
    """An error and what the budget allows for it; `used` is the share of the allowance that is used up."""

    error: float
    allowed: float

    @property
    def kept(self) -> bool:
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        return self.error / self.allowed if self.allowed else float(self.error > 0)


def reference(
    inputs: Inputs, problem: Problem, dtype: torch.dtype | None = None, naive: Backend = NAIVE
) -> dict[str, Tensor]:
    """The output of `naive` and the gradients of q, k, v and bias that `inputs` ask for; in `dtype`, if it is given."""
    given = inputs.copied(dtype)
    with torch.set_grad_enabled(bool(given.leaves)):
        out = naive.attend(given.qkv, given.bias, _in_dtype(problem, given.qkv.dtype))
    return collect(out, given.leaves, given.grad_out)


def collect(out: Tensor, leaves: dict[str, Tensor], grad_out: Tensor, *, retain: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of `leaves` by name: dq, dk and dv each by itself, and dbias.

    Raises CheckFailed if the output does not depend on one of them.
    """
    inputs = list(leaves.values())
    gradients = torch.autograd.grad(out, inputs, grad_out, retain_graph=retain, allow_unused=True) if inputs else ()
    results = {"out": out.detach()}
    for name, gradient in zip(leaves, gradients, strict=True):
        require(gradient is not None, f"no gradient reaches {name}")
        parts = dict(zip(("dq", "dk", "dv"), gradient.unbind(3), strict=True)) if name == "qkv" else {"dbias": gradient}
        results |= parts
    return results


def shares(results: dict[str, Tensor], inputs: Inputs, problem: Problem, naive: Backend = NAIVE) -> dict[str, Share]:
    """The error of every result and what the budget allows for it, in the largest absolute value and in the 2-norm.

    Allowed is `|backend - fp64| <= 2 |naive in the same dtype - fp64| + eps`, where fp64 is `naive` on the same
    numbers in double precision, and `eps` some units of rounding times the magnitude of what the result is summed from:

    - units: 1 in the 2-norm, where roundings average out, and 4 for the largest of them all. Not none, for `naive` can
      be exact by luck where a correct backend rounds once more. In fp64, 64;
    - the rounding is that of the coarser of the result's dtype and `qkv`'s, for a backend may hold the attention
      weights in the dtype of `qkv`: an fp32 problem gets no more for a bias in bf16. To it come three roundings in
      fp32 (fp64 for fp64): that of the logits, times their size, since an exponential multiplies a relative error by
      that; that of the exponential itself; and that of sums, times the square root of their terms, since nobody says
      in which order to add;
    - the magnitude is the norm of the exact result, or that of the terms that cancel in it if it is larger. A gradient
      through a softmax is a difference, `P (dP - delta)` with `delta` the dot product of the output and its gradient.
      Where a token attends to little but itself the difference is near 0, and its rounding is that of `delta`.
    """
    exact = reference(inputs, problem, torch.float64, naive)
    coarse = exact if problem.dtype == torch.float64 else reference(inputs, problem, None, naive)
    terms = _cancelling_terms(inputs, problem, exact["out"]) if problem.differentiated else {}
    logits = _size_of_logits(inputs, problem)
    found = {}
    for name, expected in exact.items():
        of_result, of_sums = _epsilons(results[name].dtype, problem.dtype)
        summed = _windows(inputs, problem) if name == "dbias" else problem.tokens
        for norm, units in UNITS.items():
            magnitude = max(_norm(x, norm) for x in (expected, *terms.get(name, ())))
            rounding = (UNITS_FP64 if problem.dtype == torch.float64 else units) * (
                of_result + of_sums * (EXPONENTIAL + logits + summed**0.5)
            )
            allowed = 2 * _norm(coarse[name] - expected, norm) + rounding * magnitude
            found[f"{name} ({norm})"] = Share(_norm(results[name] - expected, norm), allowed)
    return found


def told_over(found: dict[str, Share]) -> str:
    """The results that are over their budget, and by how much; empty if none is."""
    return "; ".join(
        f"{name}: error {share.error:.3g}, allowed {share.allowed:.3g}"
        for name, share in found.items()
        if not share.kept
    )


def _epsilons(result: torch.dtype, dtype: torch.dtype) -> tuple[float, float]:
    """The rounding of a result, and of the sums behind it."""
    sums = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(each).eps for each in (result, dtype)), torch.finfo(sums).eps


def _norm(x: Tensor, norm: str) -> float:
    order = {"max": float("inf"), "2-norm": 2.0}[norm]
    return torch.linalg.vector_norm(x.double(), order).item() if x.numel() else 0.0


def _windows(inputs: Inputs, problem: Problem) -> int:
    batch, height, width = inputs.qkv.shape[:3]
    return batch * -(-height // problem.window[0]) * -(-width // problem.window[1])


def _size_of_logits(inputs: Inputs, problem: Problem) -> float:
    """No logit, nor any of the two terms it is a sum of, is larger than this."""
    if not inputs.qkv.numel():
        return 0.0
    q, k, _ = inputs.qkv.detach().double().norm(dim=-1).unbind(3)
    bias = 0.0 if inputs.bias is None else inputs.bias.detach().abs().max().item()
    return abs(problem.softmax_scale) * (q.max() * k.max()).item() + bias


def _cancelling_terms(inputs: Inputs, problem: Problem, out: Tensor) -> dict[str, list[Tensor]]:
    """The size of what is subtracted in the gradients through the softmax: `P delta`, times k for q and q for k.

    `delta` sums absolute values, for it is itself rounded term by term. For the bias, whose gradient is a sum over all
    windows, the root of the sum of squares.
    """
    q, k, _ = inputs.qkv.detach().double().unbind(3)
    bias = None if inputs.bias is None else inputs.bias.detach().double()
    delta = (out * inputs.grad_out.double()).abs().sum(-1, keepdim=True)
    naive = _Weights()
    with torch.enable_grad():
        values = k.clone().requires_grad_()
        mean_key = naive.attend(torch.stack((q, k, values), 3), bias, _in_dtype(problem, torch.float64))
        (mean_query,) = torch.autograd.grad(mean_key, values, delta * q)
    scale = problem.softmax_scale
    of_bias = naive.weights * by_group(delta, problem).transpose(2, 3)
    return {
        "dq": [scale * delta * mean_key.detach()],
        "dk": [scale * mean_query],
        "dbias": [of_bias.square().sum((0, 1)).sqrt()],
    }


class _Weights(Naive):
    """`naive` that keeps its attention weights `(B, groups, h, N, N)`."""

    weights: Tensor

    def drop(self, weights: Tensor, problem: Problem) -> Tensor:
        self.weights = weights.detach()
        return weights


def _in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    return replace(problem, dtype=dtype, dropout_p=0.0)
