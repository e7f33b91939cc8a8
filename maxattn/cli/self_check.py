"""Does a backend compute here what the specification says? A few small problems of the conformance kit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from maxattn.cli.output import dtype_name
from maxattn.ops.contract import Axis, Backend, Problem
from maxattn.ops.dispatch import compute_capability, explain_problem
from maxattn.testing.budget import shares, told_over
from maxattn.testing.case import Case
from maxattn.testing.observe import attend_by, observe

WINDOW, HEADS, HEAD_DIM = (7, 5), 2, 32
SIZES = {"full": (14, 10), "ragged": (16, 13)}
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
    facts, (height, width) = backend.capabilities, SIZES[size]
    problem = Problem(
        axis=axis,
        window=WINDOW,
        batch=2,
        height=height,
        width=width,
        heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
        compute_capability=compute_capability(torch.device(device)),
        bias=dtype if facts.bias else None,
        requires_grad=facts.backward,
        bias_requires_grad=facts.bias and facts.backward and facts.bias_gradient,
    )
    words = f"{axis}, {size}, {dtype_name(dtype)}"
    candidates = explain_problem(problem, backend.name).candidates
    answer = next(candidate for candidate in candidates if candidate.name == backend.name)
    if not answer.able:
        crashed = any(reason.code == "crashed" for reason in answer.reasons)
        status: Literal["failed", "unable"] = "failed" if crashed else "unable"
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
