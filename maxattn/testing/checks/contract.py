"""What a backend says about itself, and that it holds to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from maxattn.ops.call import DTYPES
from maxattn.ops.contract import API_VERSION, Capabilities, Problem, Reason
from maxattn.ops.dispatch import BackendUnavailableError
from maxattn.testing import strategies
from maxattn.testing.case import Case
from maxattn.testing.failure import NotApplicable, require
from maxattn.testing.observe import deterministic
from maxattn.testing.registry import check
from maxattn.testing.subject import HEADS, Subject, full_windows


@check("the backend has a name, an API version and facts, and attend takes just qkv, bias and problem")
def interface(subject: Subject) -> None:
    backend = subject.backend
    require(isinstance(backend.name, str) and backend.name.isidentifier(), f"name {backend.name!r} is no identifier")
    require(backend.api_version[0] == API_VERSION[0], f"api_version is {backend.api_version}, not {API_VERSION}")
    require(isinstance(backend.capabilities, Capabilities), f"capabilities are {backend.capabilities!r}")
    names = [str(parameter) for parameter in inspect.signature(backend.attend).parameters.values()]
    bare = [name.split(":")[0] for name in names]
    require(bare == ["qkv", "bias", "problem"], f"attend takes ({', '.join(bare)}), not (qkv, bias, problem)")
    subject.count()


@check("whether it can serve a problem is always told, as reasons, the same each time")
def answers(subject: Subject) -> None:
    ends: list[dict[str, Any]] = [{"heads": heads} for heads in (1, 9, 32)]
    ends += [{"head_dim": d} for d in subject.head_dims(strategies.HEAD_DIMS[-1])]
    ends += [full_windows(window) for window in subject.windows(1024)[:: -(len(subject.windows(1024)) // -50)]]
    base = Case(problem=subject.base)
    subject.try_each([base.but(**end) for end in ends], lambda case: _check_answers(subject, case.problem))
    subject.try_drawn(subject.all_cases(), lambda case: _check_answers(subject, case.problem))


def _check_answers(subject: Subject, problem: Problem) -> None:
    backend, told = subject.backend, []
    variants = [problem, replace(problem, batch=None, compiling=True), replace(problem, batch=0)]
    variants += [replace(problem, batch=None, height=None, width=None, compiling=True, exporting=True)]
    variants += [replace(problem, dropout_p=0.5), replace(problem, deterministic=True)]
    for each in (*variants, *variants):
        reasons = backend.capabilities.unsupported(each) or backend.unsupported(each)
        require(isinstance(reasons, Sequence), f"unsupported() returns {reasons!r}, not a list of maxattn.Reason")
        for reason in reasons:
            require(isinstance(reason, Reason), f"unsupported() must give maxattn.Reason, not {reason!r}")
            require(bool(reason.code) and bool(reason.message), f"a reason needs a code and a message: {reason!r}")
        speed, kernel = backend.relative_speed(each), backend.kernel(each)
        require(math.isfinite(speed) and speed >= 0, f"relative_speed() is {speed!r}, not a finite number from 0 up")
        require(isinstance(kernel, str), f"kernel() returns {kernel!r}, not a text")
        told.append([reason.code for reason in reasons])
    require(told[: len(variants)] == told[len(variants) :], f"unsupported() changes its mind: {told}")


@check("every declared fact holds for some problem at least: none is declared that is always declined")
def declared_is_served(subject: Subject) -> None:
    for fact, changes in _declared(subject).items():
        served, reasons = _first_served(subject, changes)
        require(served is not None, f"{fact} is declared, but always declined: {'; '.join(sorted(reasons))}")
        if served is not None and not (served.problem.compiling or served.problem.dropout_p):
            subject.try_each([served], subject.verify)


def _declared(subject: Subject) -> dict[str, list[dict[str, Any]]]:
    """What is declared, in words, and changes to a problem each of which asks for it."""
    facts, base = subject.facts, subject.base
    dims, windows = subject.head_dims(strategies.HEAD_DIMS[-1]), subject.windows()
    head_dim_ends = (dims[0], dims[-1]) if facts.head_dims else ()
    token_ends = sorted({a * b for a, b in (windows[0], windows[-1])}) if facts.window_tokens else ()
    features: dict[str, list[dict[str, Any]]] = {
        "bias_gradient": [{"bias": base.bias, "bias_requires_grad": facts.backward and facts.bias}],
        "backward": [{"requires_grad": True}],
        "dropout": [{"dropout_p": 0.5}],
        "deterministic": [{"deterministic": True}],
        "ragged": [{"window": (a, b), **size} for a, b in (base.window, *windows) for size in _ragged_sizes(a, b)],
        "compile": [{"compiling": True}],
        "export": [{"compiling": True, "exporting": True}],
    }
    return {
        **{f"{dtype}": [{"dtype": dtype}] for dtype in strategies.dtypes(facts)},
        **{f"a bias of {dtype}": [{"bias": dtype}] for dtype in strategies.bias_dtypes(facts)},
        **{f"head_dim {d}": [{"head_dim": d}] for d in head_dim_ends},
        **{f"a window of {n} tokens": [full_windows((a, b)) for a, b in windows if a * b == n] for n in token_ends},
        **{name: changes for name, changes in features.items() if getattr(facts, name)},
    }


def _ragged_sizes(P_h: int, P_w: int) -> list[dict[str, Any]]:
    """Sizes that the window does not divide: next to whole windows, and multiples of 16 as some kernels want them."""
    sizes = [(2 * P_h - 1, P_w), (16, 16), (32, 48)]
    return [{"height": H, "width": W} for H, W in sizes if H % P_h or W % P_w]


def _first_served(subject: Subject, changes: list[dict[str, Any]]) -> tuple[Case | None, set[str]]:
    """The first of many problems with one of `changes` that is not declined; and the reasons of those that are."""
    windows, dims = subject.windows(), subject.head_dims(64)
    reasons: set[str] = set()
    for heads, axis, change, window, d, dtype, bias, gradient, batch in product(
        dict.fromkeys((subject.base.heads, *HEADS)),
        strategies.AXES,
        changes,
        (subject.base.window, windows[0], windows[-1]),
        (subject.base.head_dim, dims[0], dims[-1]),
        strategies.dtypes(subject.facts),
        (subject.base.bias, None),
        (subject.facts.backward, False),
        (1, 2, 8),
    ):
        of_bias = gradient and bias is not None and subject.facts.bias_gradient
        plain = {**full_windows(window), "head_dim": d, "dtype": dtype, "bias": bias, "requires_grad": gradient}
        plain |= {"heads": heads, "axis": axis, "width": 2 * window[1]}
        plain |= {"bias_requires_grad": of_bias}
        case = Case(problem=subject.base).but(**(plain | change | {"batch": batch}))
        declined = subject.reasons(case.problem)
        if not declined:
            return case, set()
        reasons |= set(map(str, declined))
    return None, reasons


@check("what is not declared is refused with a reason, and attend is not reached")
def undeclared_is_refused(subject: Subject) -> None:
    undeclared = _undeclared(subject)
    if not undeclared:
        raise NotApplicable("everything is declared")
    subject.try_each(undeclared, lambda case: _check_refused(subject, case))


def _check_refused(subject: Subject, case: Case) -> None:
    inputs = case.tensors()
    try:
        with deterministic(case.problem.deterministic), torch.set_grad_enabled(case.problem.differentiated):
            subject.attend(case)(inputs.qkv, inputs.bias)
    except BackendUnavailableError as error:
        require(any(error.reasons.values()), "it is refused without a reason")
        return
    require(False, "it is not declared, but served all the same")


def _undeclared(subject: Subject) -> list[Case]:
    """Cases that differ from one that is served in one undeclared fact."""
    facts, base = subject.backend.capabilities, Case(problem=subject.base)
    changes: list[dict[str, Any]] = [{"dtype": dtype} for dtype in DTYPES if dtype not in facts.dtypes]
    if facts.head_dims is not None:
        low, high = facts.head_dims
        changes += [{"head_dim": d} for d in (low - facts.head_dim_multiple, high + facts.head_dim_multiple) if d > 0]
    if facts.head_dim_multiple > 1:
        changes.append({"head_dim": subject.base.head_dim + 1})
    if facts.window_tokens is not None:
        low, high = facts.window_tokens
        changes += [full_windows((1, tokens)) for tokens in (low - 1, high + 1) if tokens > 0]
    if facts.bias_dtypes is not None and facts.bias:
        changes += [{"bias": dtype} for dtype in DTYPES if dtype not in facts.bias_dtypes]
    undeclared: dict[str, dict[str, Any]] = {
        "ragged": {"height": 2 * subject.base.window[0] + 1, "window": subject.base.window},
        "bias": {"bias": subject.base.dtype},
        "bias_gradient": {"bias": subject.base.dtype, "bias_requires_grad": True},
        "backward": {"requires_grad": True},
        "dropout": {"dropout_p": 0.5},
        "deterministic": {"deterministic": True},
    }
    changes += [change for name, change in undeclared.items() if not getattr(facts, name)]
    return [base.but(**change) for change in changes]
