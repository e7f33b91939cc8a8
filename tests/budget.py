"""The error budget of a backend: how far from exact it may be, given how far the specification itself is.

Shapes: B batch, H x W pixels, h heads, d head_dim, N tokens of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import maxattn
from maxattn.ops.contract import Axis

NORMS = {"max": (float("inf"), 4), "2-norm": (2.0, 1)}
"""The order of each norm, and how many machine epsilons of rounding it grants beyond twice the error of `naive`."""


class Share(NamedTuple):
    """An error and what the budget allows for it."""

    error: float
    allowed: float


def assert_within_budget(
    qkv: Tensor,
    axis: Axis,
    window: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str,
) -> None:
    """Assert `|backend - fp64| <= 2 |naive in the same dtype - fp64| + eps` for the output and all gradients.

    `fp64` is `naive` on the same numbers in double precision, so `qkv` must be of a coarser dtype. Compared are the
    output and the gradients of q, k and v (each by itself) if `qkv` requires one, and of `bias` if that does, for a
    random gradient of the output; each in the largest absolute value and in the 2-norm. Where neither requires a
    gradient, the call is made under `no_grad`.

    `eps` is a few machine epsilons times the magnitude of the terms that the result is summed from:

    - a few: 1 in the 2-norm, where roundings average out, and 4 for the largest of them all. Not none, for `naive` can
      be exact by luck where a correct backend rounds once more. For logits of about 1: an exponential multiplies their
      rounding by their size, in `naive` as elsewhere;
    - the machine epsilon is that of the coarser of the result's dtype and `qkv`'s, for a backend may hold the
      attention weights in the dtype of `qkv`. So an fp32 problem gets no more for a bias in bf16;
    - the magnitude is the norm of the exact result, or that of the terms that cancel in it if it is larger. A gradient
      through a softmax is a difference, `P (dP - delta)` with `delta` the dot product of the output and its gradient.
      Where a token attends to little but itself the difference is near 0, and its rounding is that of `delta`.
    """
    shares = budget_shares(qkv, axis, window, bias, scale, backend=backend)
    over = [
        f"{name}: error {share.error:.3g}, allowed {share.allowed:.3g}"
        for name, share in shares.items()
        if not share.error <= share.allowed
    ]
    assert not over, f"{backend} is over the error budget:\n" + "\n".join(over)


def budget_shares(
    qkv: Tensor,
    axis: Axis,
    window: tuple[int, int],
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str,
) -> dict[str, Share]:
    """The error and the allowance of every result, in both norms: what `assert_within_budget` asserts."""
    assert qkv.dtype != torch.float64, "nothing here is more exact than fp64"
    generator = torch.Generator(qkv.device).manual_seed(0)
    grad_out = torch.randn(qkv[:, :, :, 0].shape, generator=generator, device=qkv.device).to(qkv.dtype)
    double = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in (qkv, bias)]
    exact = _results(double[0], axis, window, double[1], scale, "naive", grad_out)
    naive = _results(qkv, axis, window, bias, scale, "naive", grad_out)
    tested = _results(qkv, axis, window, bias, scale, backend, grad_out)
    terms = _cancelling_terms(double[0], axis, window, double[1], scale, exact["out"], grad_out.double())
    assert tested.keys() == exact.keys()

    shares = {}
    for name, reference in exact.items():
        assert tested[name].shape == naive[name].shape
        assert tested[name].dtype == naive[name].dtype
        epsilon = max(torch.finfo(x.dtype).eps for x in (qkv, tested[name]))
        for norm, (order, units) in NORMS.items():
            magnitude = max(_norm(x, order) for x in (reference, *terms[name]))
            allowed = 2 * _norm(naive[name] - reference, order) + units * epsilon * magnitude
            shares[f"{name} ({norm})"] = Share(_norm(tested[name] - reference, order), allowed)
    return shares


def _norm(x: Tensor, order: float) -> float:
    return torch.linalg.vector_norm(x.double(), order).item() if x.numel() else 0.0


def _results(
    qkv: Tensor,
    axis: Axis,
    window: tuple[int, int],
    bias: Tensor | None,
    scale: float | None,
    backend: str,
    grad_out: Tensor,
) -> dict[str, Tensor]:
    """The output and the gradients of what requires one, by name."""
    leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in (qkv, bias)]
    differentiated = {
        name: x for name, x in zip(("qkv", "bias"), leaves, strict=True) if x is not None and x.requires_grad
    }
    with torch.set_grad_enabled(bool(differentiated)):
        out = maxattn.max_sa(leaves[0], axis, window, leaves[1], scale, backend=backend)
    gradients = (
        torch.autograd.grad(out, list(differentiated.values()), grad_out.to(out.dtype)) if differentiated else ()
    )
    results = {"out": out.detach()}
    for name, gradient in zip(differentiated, gradients, strict=True):
        parts = dict(zip(("dq", "dk", "dv"), gradient.unbind(3), strict=True)) if name == "qkv" else {"dbias": gradient}
        results |= parts
    return results


def _cancelling_terms(
    qkv: Tensor,
    axis: Axis,
    window: tuple[int, int],
    bias: Tensor | None,
    scale: float | None,
    out: Tensor,
    grad_out: Tensor,
) -> dict[str, list[Tensor]]:
    """The size of what is subtracted in the gradients through the softmax: `P delta`, times k for q and q for k.

    `delta` sums absolute values, for it is itself rounded term by term. The bias is given its typical entry, for N x N
    terms a window are not to be had from the operator: the root of the sum of squares over the windows.
    """
    q, k, _ = qkv.detach().unbind(3)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    delta = (out * grad_out).abs().sum(-1, keepdim=True)
    values = k.clone().requires_grad_()
    bias = None if bias is None else bias.detach()
    mean_key = maxattn.max_sa(torch.stack((q, k, values), 3), axis, window, bias, scale, backend="naive")
    (mean_query,) = torch.autograd.grad(mean_key, values, delta * q)
    tokens = window[0] * window[1]
    typical = (delta.square().sum((0, 1, 2)) / tokens).sqrt() / tokens
    return {
        "out": [],
        "dq": [scale * delta * mean_key.detach()],
        "dk": [scale * mean_query],
        "dv": [],
        "dbias": [typical[:, :, None].expand(-1, tokens, tokens)],
    }
