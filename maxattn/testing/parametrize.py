"""`parametrize_with_backend_checks`: the conformance kit as tests of pytest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest

from maxattn.ops.contract import Backend
from maxattn.ops.registry import registered
from maxattn.testing.failure import CheckFailed
from maxattn.testing.registry import CHECKS
from maxattn.testing.runner import checks_named, find_backend, run, subject_of


def parametrize_with_backend_checks(
    backend: Backend | str,
    expected_failures: Mapping[str, str] | None = None,
    *,
    device: str = "cpu",
    examples: int = 20,
    seed: int = 0,
) -> pytest.MarkDecorator:
    """Parametrize a test, whose argument is `check`, with every check that applies to `backend`.

    `expected_failures` are the names of checks that are known to fail, each with the reason. One that passes after all
    fails the test, so that the list stays true. The other arguments are those of `check_backend`.

    Raises:
        TypeError: for expected failures that are no mapping of names to reasons.
        ValueError: for an expected failure of an unknown check, of one that does not apply, or without a reason.

    Example:
        >>> from maxattn.ops.naive import Naive
        >>> @parametrize_with_backend_checks(Naive(), examples=5)
        ... def test_naive(check):
        ...     check()
    """
    if not isinstance(expected_failures, Mapping | None):
        raise TypeError(f"expected_failures must map names of checks to reasons, not be {expected_failures!r}")
    backend, expected = find_backend(backend), dict(expected_failures or {})
    checks_named(list(expected))
    for name, why in expected.items():
        if not isinstance(why, str) or not why.strip():
            raise ValueError(f"the failure of {name!r} is expected, but not why: {why!r} is no reason")
    subject = subject_of(backend, device, examples, seed)
    applicable = [check for check in CHECKS.values() if not check.not_applicable(subject)]
    for name in expected:
        if name not in {check.name for check in applicable}:
            why = CHECKS[name].not_applicable(subject)
            raise ValueError(f"a failure of {name!r} is expected, which does not apply to {backend.name}: {why}")
    params = []
    for check in applicable:
        reason = expected.get(check.name)
        marks = [pytest.mark.xfail(reason=reason, strict=True, raises=CheckFailed)] if reason is not None else []
        params.append(
            pytest.param(partial(_check, backend, check.name, device, examples, seed), id=check.name, marks=marks)
        )
    return pytest.mark.parametrize("check", params)


def _check(backend: Backend, name: str, device: str, examples: int, seed: int) -> None:
    with registered(backend):
        outcome = run(CHECKS[name], subject_of(backend, device, examples, seed))
    if outcome.status == "not applicable":
        pytest.skip(outcome.reason)
    if outcome.status == "failed":
        raise CheckFailed(f"{outcome.promise}\n{outcome}")
