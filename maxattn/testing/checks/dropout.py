"""Dropout of attention weights: seeded, of the right rate and scale, independent, and the same in the backward pass.

Shapes: B batch, G windows of N tokens, h heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from maxattn.ops.contract import Problem
from maxattn.ops.naive import Naive
from maxattn.testing import strategies
from maxattn.testing.budget import UNITS
from maxattn.testing.case import QKV_LAYOUTS, Case
from maxattn.testing.failure import require
from maxattn.testing.groups import by_group, token_of_pixel
from maxattn.testing.observe import observe, within_budget
from maxattn.testing.registry import check, declared
from maxattn.testing.subject import SEVERAL_TILES, Subject, full_windows

RATES = (0.1, 0.5, 0.8)
SEEDS = 12
SIGMAS = 7.0
"""How far a count may be from its mean, in standard deviations of independent draws."""


@check("torch.manual_seed decides what is dropped; without it no two calls drop the same", declared("dropout"))
def dropout_seed(subject: Subject) -> None:
    subject.try_each(_cases(subject, 0.5), lambda case: _check_seed(subject, case))


def _check_seed(subject: Subject, case: Case) -> None:
    inputs, attend = case.tensors(), subject.attend(case)

    def attended() -> Tensor:
        return attend(inputs.qkv, inputs.bias).detach()

    with _seed(0):
        in_a_row = [attended() for _ in range(SEEDS)]
    of_seeds = []
    for seed in (0, *range(SEEDS)):
        with _seed(seed):
            of_seeds.append(attended())
    require(_alike(of_seeds[0], of_seeds[1]), "the same seed gives two results")
    require(not _any_alike(of_seeds[1:]), "two seeds give the same result")
    require(not _any_alike(in_a_row), "two calls without a seed between them drop the same")


def _any_alike(results: list[Tensor]) -> bool:
    return any(_alike(a, b) for a, b in combinations(results, 2))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding; of different weights dropped, the difference is as large as the results."""
    return bool((a - b).double().norm() <= 0.02 * a.double().norm())


@check("weights are kept with probability 1 - p, each by itself, and scaled by 1 / (1 - p)", declared("dropout"))
def dropout_rate(subject: Subject) -> None:
    tiled = full_windows(subject.largest_window(SEVERAL_TILES)) | {"dropout_p": 0.5, "values": "constant"}
    cases = _cases(subject, *RATES, values="constant") + subject.variants(tiled)
    subject.try_each(cases, lambda case: _check_rate(subject, case))


def _check_rate(subject: Subject, case: Case) -> None:
    p, N = case.problem.dropout_p, case.problem.tokens
    weights = _weights(subject, case)
    kept, of_one = weights != 0, 1 / (N * (1 - p))
    worst = ((weights[kept] - of_one).abs().max() / of_one).item() if kept.any() else 0.0
    epsilon = UNITS["max"] * torch.finfo(case.problem.dtype).eps
    require(worst <= epsilon, f"a kept weight is off by {worst:.3g} of P / (1 - p), allowed {epsilon:.3g}")
    _require_rate(kept, 1 - p, "a weight is kept")
    for dim, what in enumerate(("images", "windows", "heads", "queries", "keys")):
        for apart in range(1, kept.shape[dim]):
            rest = kept.shape[dim] - apart
            both = kept.narrow(dim, 0, rest) & kept.narrow(dim, apart, rest)
            _require_rate(both, (1 - p) ** 2, f"of two weights {apart} {what} apart, both are kept")


def _require_rate(events: Tensor, expected: float, what: str) -> None:
    seen, sigma = events.double().mean().item(), (expected * (1 - expected) / events.numel()) ** 0.5
    told = f"{what} in {seen:.4f} of {events.numel():,} cases, not in {expected:.4f}"
    require(abs(seen - expected) <= SIGMAS * sigma, told)


@check("the gradients are those of the very weights that the forward pass kept", declared("dropout", "backward"))
def dropout_gradient(subject: Subject) -> None:
    cases = _cases(subject, 0.3)
    P_h, P_w = subject.base.window
    changes: list[dict[str, Any]] = [{"height": P_h + 1}, {"width": P_w + 1}, {"height": P_h + 1, "width": 2 * P_w - 1}]
    changes += [{"values": "huge"}, {"scale": 0.3}]
    changed = [case.but(**change) for case in cases[:2] for change in changes]
    served = [case for case in (*cases, *changed) if not subject.reasons(case.problem)]
    subject.try_each(served, lambda case: _check_gradient(subject, case))
    anything = strategies.cases(subject.facts, subject.base, **strategies.ANYTHING)
    dropped = anything.map(lambda case: case.but(dropout_p=0.3, layout=_writable(case.layout)))
    subject.try_drawn(subject.served(dropped), lambda case: _check_gradient(subject, case), share=0.5)


def _writable(layout: str) -> str:
    """The layout, unless its pixels share memory: values are written to each."""
    return "contiguous" if QKV_LAYOUTS[layout].expanded is not None else layout


def _check_gradient(subject: Subject, case: Case) -> None:
    plain = case.but(values="constant")  # no weight is 0 but those that are dropped
    factor = (_weights(subject, plain) != 0).double() / (1 - case.problem.dropout_p)
    inputs = case.tensors()
    with _seed(case.seed):
        results = observe(subject.attend(case), inputs, case)
    within_budget(results, inputs, case, Kept(factor))


class Kept(Naive):
    """`naive` with a dropout that is known: `factor (B, G, h, N, N)` on the attention weights."""

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor

    def drop(self, weights: Tensor, problem: Problem) -> Tensor:
        return weights * self._factor.to(weights.dtype)


def _cases(subject: Subject, *rates: float, values: str = "normal") -> list[Case]:
    """Problems small enough to read all weights, with enough of them to count."""
    P_h, P_w = subject.base.window
    sizes = {"batch": 3, "height": 2 * P_h, "width": 2 * P_w, "heads": 4}
    tried: list[dict[str, Any]] = [{"dropout_p": p} for p in rates]
    last: dict[str, Any] = {"dropout_p": rates[-1]}
    tried += [last | {"dtype": dtype} for dtype in strategies.dtypes(subject.facts)]
    tried.append(last | {"requires_grad": False, "bias_requires_grad": False})
    tried.append(last | {"bias": None, "bias_requires_grad": False})
    tried.append(last | full_windows(subject.largest_window(strategies.SMALL_TOKENS)))
    return subject.variants(*({**sizes, **one} for one in tried), values=values)


def _weights(subject: Subject, case: Case) -> Tensor:
    """The attention weights after dropout, `(B, G, h, N, N)` in fp64, seen through values that are unit vectors.

    Where the head dim is smaller than N, some columns at a time: one seed drops the same each time.
    """
    problem, attend = case.problem, subject.attend(case)
    (qkv, bias, _), N, d = case.tensors(), problem.tokens, problem.head_dim
    token = token_of_pixel(qkv.shape[1], qkv.shape[2], problem, qkv.device)
    parts = []
    for first in range(0, N, d):
        values = torch.nn.functional.pad(torch.eye(N, device=qkv.device), (0, d))[token, first : first + d]
        with torch.no_grad():
            qkv[:, :, :, 2] = values[None, :, :, None, :].to(qkv.dtype)
        with _seed(case.seed):
            parts.append(attend(qkv, bias).detach().double())
    return by_group(torch.cat(parts, -1)[..., :N], problem).movedim(3, 2)


@contextmanager
def _seed(seed: int) -> Iterator[None]:
    """Seeded within a `with` block; outside it the generators go on as if nothing had been drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
