"""`check_backend`: run the checks on a backend and report."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial

import torch

import maxattn.testing.checks  # noqa: F401 - registers them
from maxattn.ops.contract import Backend
from maxattn.ops.registry import backends, checked, registered
from maxattn.testing.failure import CheckFailed, NotApplicable
from maxattn.testing.registry import CHECKS, Check
from maxattn.testing.report import Outcome, Report
from maxattn.testing.subject import Failing, Subject

LARGEST_SEED = 2**62
Progress = Callable[[Check], None]
"""Told of every case that is done."""


def check_backend(
    backend: Backend | str,
    *,
    device: str = "cpu",
    examples: int = 100,
    seed: int = 0,
    only: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
    fail_fast: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check that a backend computes Max-SA as `naive` does, for everything that it declares; and keeps to the contract.

    The problems are drawn from the backend's own capabilities. Each is computed by the backend and by `naive` in fp64:
    the errors of the output and of all gradients must stay within a budget relative to those of `naive` in the same
    dtype. The same arguments give the same examples.

    Args:
        backend: an instance, or the name of one that is registered.
        device: the kind of device to check on: "cpu", "cuda".
        examples: about how many problems each of the larger checks draws.
        seed: draws other problems.
        only: the names of the checks to run; by default all that apply.
        dtypes: the dtypes to check, of those declared; by default all.
        fail_fast: stop at the first check that fails.
        progress: called with the check after each of its cases.

    Returns:
        A `Report`. Print it to read it; `report.passed` is the verdict.

    Raises:
        ValueError: for an unknown backend or check, a device that is not here, or a dtype that is not declared.
        TypeError: for what is no backend, and arguments of another type.

    Example:
        >>> from maxattn.testing import check_backend
        >>> report = check_backend("naive", examples=5, only=["forward", "empty_batch"])
        >>> report.passed, [outcome.name for outcome in report.checks]
        (True, ['forward', 'empty_batch'])
    """
    found = find_backend(backend)
    checks = checks_named(only)
    outcomes = []
    with registered(found):
        for check in checks:
            subject = subject_of(found, device, examples, seed, dtypes)
            if progress is not None:
                subject.on_case = partial(progress, check)
            outcomes.append(run(check, subject))
            if outcomes[-1].fatal or (fail_fast and outcomes[-1].status == "failed"):
                break
    return Report(found.name, device, tuple(outcomes))


def subject_of(backend: Backend, device: str, examples: int, seed: int, dtypes: Sequence[torch.dtype] = ()) -> Subject:
    """What checks are given, for arguments of `check_backend`."""
    facts = backend.capabilities
    for name, number in (("examples", examples), ("seed", seed)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, not {number!r}")
    if examples < 1:
        raise ValueError(f"examples must be at least 1, not {examples}")
    if not 0 <= seed < LARGEST_SEED:
        raise ValueError(f"seed must be from 0 to 2**62, not {seed}")
    _require_device(device)
    if facts.devices is not None and device not in facts.devices:
        raise ValueError(f"{backend.name} declares no support for {device}: {', '.join(sorted(facts.devices))}")
    if isinstance(dtypes, torch.dtype):
        raise TypeError(f"dtypes must be a list: [{dtypes}]")
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtypes must be a list of dtypes such as torch.float32, not of {dtype!r}")
        if dtype not in facts.dtypes:
            known = ", ".join(sorted(map(str, facts.dtypes)))
            raise ValueError(f"{backend.name} does not declare {dtype}: {known}")
    return Subject(backend, device, examples, seed, dtypes)


def _require_device(device: str) -> None:
    try:
        kind = torch.device(device) if isinstance(device, str) else None
    except RuntimeError:
        kind = None
    if kind is None or kind.index is not None or kind.type == "meta":
        raise ValueError(f"device {device!r} is no kind of device: give one such as cpu or cuda")
    if kind.type != "cpu" and not torch.get_device_module(kind).is_available():
        raise ValueError(f"device {device!r}: there is none here")


def checks_named(only: Sequence[str]) -> list[Check]:
    """The checks of these names, in the order in which they run; all if none is given."""
    if isinstance(only, str):
        raise TypeError(f"only must be a list of names: [{only!r}]")
    for name in only:
        if name not in CHECKS:
            near = get_close_matches(name, CHECKS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(CHECKS)}"
            raise ValueError(f"no check is named {name!r}; {hint}")
    return [check for name, check in CHECKS.items() if not only or name in only]


def run(check: Check, subject: Subject) -> Outcome:
    """Run one check; whatever a backend raises is a failure of it."""
    reason = check.not_applicable(subject)
    if reason:
        return Outcome(check.name, check.promise, "not applicable", subject.seed, reason=reason)
    try:
        with _default_modes():
            check.run(subject)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a backend may even leave the program
        failing = error if isinstance(error, Failing) else Failing(None, error)
        if isinstance(failing.cause, NotApplicable):
            return Outcome(check.name, check.promise, "not applicable", subject.seed, reason=str(failing.cause))
        told, fatal = _told(failing.cause), failing.fatal
        return Outcome(check.name, check.promise, "failed", subject.seed, subject.done, told, failing.case, fatal)
    if not subject.done:
        reason = "the backend declines all of its problems"
        return Outcome(check.name, check.promise, "not applicable", subject.seed, reason=reason)
    return Outcome(check.name, check.promise, "passed", subject.seed, subject.done)


def _told(error: BaseException) -> str:
    """What failed, and for an error of the backend's own, where."""
    if isinstance(error, CheckFailed):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
    return f"it raises {type(error).__name__}: {' '.join(str(error).split())[:1000]}{place}"


def find_backend(backend: Backend | str) -> Backend:
    """The backend itself, or the registered one of this name."""
    if isinstance(backend, str):
        known = backends()
        if backend not in known:
            near = get_close_matches(backend, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"no backend is named {backend!r}; {hint}known: {', '.join(sorted(known))}")
        return known[backend]
    return checked(backend)


@contextmanager
def _default_modes() -> Iterator[None]:
    """Products in full precision, determinism only where a check asks for it; afterwards all as it was before."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    warn_only, dtype = torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_default_dtype()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
