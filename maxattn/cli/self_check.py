"""Does a backend compute here what the specification says? A few small problems of the conformance kit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from maxattn.ops.contract import Axis, Backend, Problem, dtype_name
from maxattn.ops.dispatch import Candidate, compute_capability, explain_problem
from maxattn.testing.budget import shares, told_over
from maxattn.testing.case import Case
from maxattn.testing.observe import attend_by, observe

WINDOWS = ((7, 5), (7, 7), (8, 8), (4, 4), (16, 16), (2, 2))
"""The first that a backend serves is tried; likewise of the head dims."""
HEAD_DIMS = (32, 64, 16, 128)
SIZES = {"full": (0, 0), "ragged": (2, 3)}
"""Pixels that an image has more than two windows along each side."""
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Check:
    """One problem given to one backend: `problem` in words, and how it went.

    `share` is the largest error as a share of what is allowed, of the output or any gradient; None if there is none,
    or no finite one. `detail` has the reasons of an unable backend, or what failed.
    """

    backend: str
    device: str
    problem: str
    status: Literal["ok", "failed", "unable"]
    share: float | None = None
    detail: str = ""


def check_backend(backend: Backend, device: str) -> list[Check]:
    """Have `backend` compute block and grid attention, with full and with ragged windows, in fp32 and bf16.

    Bias and gradients are asked for where it declares them. Errors must stay within the conformance kit's budget. The
    backend must be registered.
    """
    axes: tuple[Axis, ...] = ("block", "grid")
    return [_check(backend, device, dtype, axis, size) for dtype, axis, size in product(DTYPES, axes, SIZES)]


def _check(backend: Backend, device: str, dtype: torch.dtype, axis: Axis, size: str) -> Check:
    words = f"{axis}, {size}, {dtype_name(dtype)}"
    asked = [(problem, _answer(problem, backend)) for problem in _problems(backend, device, dtype, axis, size)]
    problem, answer = next((one for one in asked if one[1].able or _crashed(one[1])), asked[0])
    if not answer.able:
        status: Literal["failed", "unable"] = "failed" if _crashed(answer) else "unable"
        return Check(backend.name, device, words, status, detail="; ".join(map(str, answer.reasons)))
    try:
        case = Case(problem=problem)
        inputs = case.tensors()
        found = shares(observe(attend_by(backend.name, case), inputs, case), inputs, problem)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a backend may even leave the program
        told = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Check(backend.name, device, words, "failed", detail=f"{told}{error}".splitlines()[0])
    over = told_over(found)
    used = [share.used for share in found.values()]
    share = max(used) if all(map(math.isfinite, used)) else None
    return Check(backend.name, device, words, "failed" if over else "ok", share, over)


def _answer(problem: Problem, backend: Backend) -> Candidate:
    candidates = explain_problem(problem, backend.name).candidates
    return next(candidate for candidate in candidates if candidate.name == backend.name)


def _crashed(answer: Candidate) -> bool:
    return any(reason.code == "crashed" for reason in answer.reasons)


def _problems(backend: Backend, device: str, dtype: torch.dtype, axis: Axis, size: str) -> Iterator[Problem]:
    """Problems of this kind to choose from, with a bias and gradients where the backend declares them."""
    facts = backend.capabilities
    for (P_h, P_w), head_dim in product(WINDOWS, HEAD_DIMS):
        yield Problem(
            axis=axis,
            window=(P_h, P_w),
            batch=2,
            height=2 * P_h + SIZES[size][0],
            width=2 * P_w + SIZES[size][1],
            heads=2,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            compute_capability=compute_capability(torch.device(device)),
            bias=dtype if facts.bias else None,
            requires_grad=facts.backward,
            bias_requires_grad=facts.bias and facts.backward and facts.bias_gradient,
        )
