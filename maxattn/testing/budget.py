"""The error budget of a backend: how far from exact it may be, given how far the specification itself is.

Shapes: B batch, H x W pixels, h heads, d head_dim, N tokens of a window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Problem
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
    inputs: Inputs, problem: Problem, dtype: torch.dtype | None = None, naive: Naive = NAIVE
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


class Allowance(NamedTuple):
    """What a result may be off by in one norm: `fixed`, and `magnitude` times the rounding of its dtype."""

    fixed: float
    magnitude: float


class Budget(NamedTuple):
    """What is exact for some inputs, and how far from it a backend may be, by name of the result and norm.

    Allowed is `|backend - fp64| <= 2 |naive in the same dtype - fp64| + eps`, where fp64 is `naive` on the same
    numbers in double precision, and `eps` some units of rounding times the magnitude of what the result is summed from:

    - units: 1 in the 2-norm, where roundings average out, and 4 for the largest of them all. Not none, for `naive` can
      be exact by luck where a correct backend rounds once more. In fp64, 64;
    - the rounding is that of the coarser of the result's dtype and `qkv`'s, for a backend may hold the attention
      weights in the dtype of `qkv`: an fp32 problem gets no more for a bias in bf16. To it come three roundings in
      fp32 (fp64 for fp64): that of the logits, times their size, since an exponential multiplies a relative error by
      that; that of the exponential itself; and that of sums. A sum is rounded once for the square root of its terms,
      since nobody says in which order to add;
    - the magnitude is the norm of the exact result, or that of the terms that cancel in it if it is larger. A gradient
      through a softmax is a difference, `P (dP - delta)` with `delta` the dot product of the output and its gradient.
      Where a token attends to little but itself the difference is near 0, and its rounding is that of `delta`. The
      terms of `P v` and of the gradient of v may cancel too, but are summed in fp32: they count for its roundings.
    """

    dtype: torch.dtype
    exact: dict[str, Tensor]
    allowed: dict[tuple[str, str], Allowance]

    @classmethod
    def of(cls, inputs: Inputs, problem: Problem, naive: Naive) -> Budget:
        watched = _Watched(naive)
        exact = reference(inputs, problem, torch.float64, watched)
        coarse = exact if problem.dtype == torch.float64 else reference(inputs, problem, None, naive)
        terms = _Terms.of(inputs, problem, exact["out"], watched.weights)
        logits = _size_of_logits(inputs, problem)
        allowed = {}
        for name, expected in exact.items():
            roundings = EXPONENTIAL + logits + (_windows(inputs, problem) if name == "dbias" else problem.tokens) ** 0.5
            of_sums = torch.finfo(torch.promote_types(problem.dtype, torch.float32)).eps * roundings
            for norm, few in UNITS.items():
                units = UNITS_FP64 if problem.dtype == torch.float64 else few
                of_rounded = max(_norm(expected, norm), _norm(terms.rounded.get(name, expected), norm))
                of_summed = max(of_rounded, _norm(terms.summed.get(name, expected), norm))
                twice = 2 * _norm(coarse[name] - expected, norm)
                allowed[name, norm] = Allowance(twice + units * of_sums * of_summed, units * of_rounded)
        return cls(problem.dtype, exact, allowed)

    def shares(self, results: dict[str, Tensor]) -> dict[str, Share]:
        """The error of every result and what is allowed for it, in the largest absolute value and in the 2-norm."""
        found = {}
        for (name, norm), (fixed, magnitude) in self.allowed.items():
            eps = max(torch.finfo(each).eps for each in (results[name].dtype, self.dtype))
            error = _norm(results[name] - self.exact[name], norm)
            found[f"{name} ({norm})"] = Share(error, fixed + eps * magnitude)
        return found


def shares(results: dict[str, Tensor], inputs: Inputs, problem: Problem, naive: Naive = NAIVE) -> dict[str, Share]:
    """The error of every result and what the `Budget` of these inputs allows for it."""
    return Budget.of(inputs, problem, naive).shares(results)


def told_over(found: dict[str, Share]) -> str:
    """The results that are over their budget, and by how much; empty if none is."""
    return "; ".join(
        f"{name}: error {share.error:.3g}, allowed {share.allowed:.3g}"
        for name, share in found.items()
        if not share.kept
    )


def _norm(x: Tensor, norm: str) -> float:
    order = {"max": float("inf"), "2-norm": 2.0}[norm]
    return torch.linalg.vector_norm(x.double(), order).item() if x.numel() else 0.0


def _windows(inputs: Inputs, problem: Problem) -> int:
    batch, height, width = inputs.qkv.shape[:3]
    return batch * -(-height // problem.window[0]) * -(-width // problem.window[1])


def _size_of_logits(inputs: Inputs, problem: Problem) -> float:
    """How many roundings of 1 a logit may be off by: it is a sum of `head_dim` terms, and the bias."""
    if not inputs.qkv.numel():
        return 0.0
    q, k, _ = inputs.qkv.detach().double().norm(dim=-1).unbind(3)
    bias = 0.0 if inputs.bias is None else inputs.bias.detach().abs().max().item()
    return abs(problem.softmax_scale) * (q.max() * k.max()).item() * problem.head_dim**0.5 + bias


class _Terms(NamedTuple):
    """The size of what cancels in the results, by their names: where each term is rounded as the result is, and where
    terms are summed in fp32. Of a sum of many, the root of the sum of squares.
    """

    rounded: dict[str, Tensor]
    summed: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Inputs, problem: Problem, out: Tensor, weights: Tensor) -> _Terms:
        """The terms of `P v` and `P dO`; and of the gradients through the softmax, which are `P delta`, times k for q
        and q for k. `delta` sums absolute values, for it is itself rounded term by term. All by group.
        """

        def grouped(x: Tensor) -> Tensor:
            """`x (B, H, W, h, ...)` as `(B, groups, h, N, ...)`."""
            return by_group(x, problem).transpose(2, 3)

        q, k, v = (grouped(x) for x in inputs.qkv.detach().double().unbind(3))
        grad_out, out = grouped(inputs.grad_out.double()), grouped(out)
        inside = grouped(torch.ones_like(inputs.qkv[:, :, :, 0, :, :1], dtype=torch.float64))
        weights = weights * inside
        squares = weights.square()
        summed = {"out": (squares @ v.square()).sqrt(), "dv": (squares.mT @ grad_out.square()).sqrt()}
        delta = (out * grad_out).abs().sum(-1, keepdim=True)
        rounded = {
            "dq": problem.softmax_scale * delta * (weights @ k),
            "dk": problem.softmax_scale * (weights.mT @ (delta * q)),
            "dbias": (squares * delta.square()).sum((0, 1)).sqrt(),
        }
        return cls(rounded, summed)


class _Watched(Naive):
    """`naive` whose attention weights `(B, groups, h, N, N)`, before dropout, are kept."""

    weights: Tensor

    def __init__(self, naive: Naive) -> None:
        self._naive = naive

    def drop(self, weights: Tensor, problem: Problem) -> Tensor:
        self.weights = weights.detach()
        return self._naive.drop(weights, problem)


def _in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    return replace(problem, dtype=dtype, dropout_p=0.0)
