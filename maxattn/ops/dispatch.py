"""Choosing a backend: explicit argument > `use_backend` > `MAXATTN_BACKEND` > automatic; and explaining the choice."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

from maxattn.ops import registry
from maxattn.ops.contract import Backend, Problem, Reason

ENVIRONMENT_VARIABLE = "MAXATTN_BACKEND"
AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))
log = logging.getLogger("maxattn")


class BackendUnavailableError(RuntimeError):
    """No backend that was asked for can serve the problem. Attributes: `problem`, `reasons` by backend name."""

    def __init__(self, message: str, problem: Problem, reasons: dict[str, list[Reason]]) -> None:
        super().__init__(message)
        self.problem = problem
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend's answer to a problem; no reasons means able."""

    name: str
    reasons: tuple[Reason, ...]
    relative_speed: float

    @property
    def able(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend serves a problem and why. `backend` is None if none that was asked for is able.

    `asked_by` tells who forced the choice ("argument", "use_backend", the environment variable) or "automatic";
    `candidates` holds every backend's answer, best first; `kernel` what the backend itself would run, if it picks.
    """

    problem: Problem
    backend: str | None
    kernel: str
    asked_by: str
    asked_for: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        asked = f"{self.asked_by}: {', '.join(self.asked_for)}" if self.asked_for else self.asked_by
        kernel = f" (kernel: {self.kernel})" if self.kernel else ""
        lines = [str(self.problem), f"-> {self.backend or 'none'}{kernel}, {asked}"]
        width = max((len(candidate.name) for candidate in self.candidates), default=0)
        for candidate in self.candidates:
            answer = "; ".join(map(str, candidate.reasons)) or f"able, {candidate.relative_speed:g}x sdpa expected"
            lines.append(f"   {candidate.name:<{width}}  {answer}")
        return "\n".join(lines)


class _TracedOverride(threading.local):
    """The override as a compiler sees it: it can guard on a thread-local, so code recompiles, not on a ContextVar."""

    def __init__(self) -> None:
        self.names: str | None = None
        self.outer: tuple[str | None, ...] = ()


_override: ContextVar[tuple[str | None, ...]] = ContextVar("maxattn_backend", default=(None,))
_traced_override = _TracedOverride()


class use_backend:  # noqa: N801 - used as a function
    """Force the backend within a `with` block: a name, or a comma list in order of preference.

    Nested blocks: the innermost wins. None gives the choice back to the environment or to the automatic rule.
    Holds for the current thread and context. Code compiled by `torch.compile` recompiles when the override changes.

    Raises:
        ValueError: at once, for an empty list of names.

    Example:
        >>> import torch, maxattn
        >>> qkv = torch.randn(1, 8, 8, 3, 2, 4)
        >>> with maxattn.use_backend("naive"):
        ...     maxattn.explain(qkv, "block", 4).backend
        'naive'
    """

    def __init__(self, names: str | None) -> None:
        if names is not None:
            _split_names(names)
        self._names = names

    def __enter__(self) -> None:
        _traced_override.outer = (*_traced_override.outer, _traced_override.names)
        _traced_override.names = self._names
        if not torch.compiler.is_compiling():
            _override.set((*_override.get(), self._names))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        *outer, _traced_override.names = _traced_override.outer
        _traced_override.outer = tuple(outer)
        if not torch.compiler.is_compiling():
            _override.set(_override.get()[:-1])


def eager_override() -> str | None:
    """What `use_backend` asks for now."""
    return _override.get()[-1]


def traced_override() -> str | None:
    """What `use_backend` asks for, read in a way that a compiler can trace and guard on."""
    return _traced_override.names


def asked(argument: str | None, context: str | None) -> tuple[str, str | None]:
    """Who asks for a backend, and for which: the argument, else `use_backend`, else the environment, else nobody."""
    if argument is not None:
        return "backend argument", argument
    if context is not None:
        return "use_backend", context
    names = os.environ.get(ENVIRONMENT_VARIABLE, "").strip(", ")
    return (ENVIRONMENT_VARIABLE, names) if names else ("automatic", None)


def choose(problem: Problem, asked_by: str, names: str | None) -> Backend:
    """The backend for `problem`, given what `asked` says.

    Raises:
        BackendUnavailableError: if a forced choice cannot serve the problem, or no backend at all can.
    """
    explanation = _explain(problem, asked_by, names)
    if explanation.backend is None:
        raise _unavailable(explanation)
    log.log(logging.INFO if not explanation.asked_for else logging.DEBUG, "%s", explanation)
    return registry.backends()[explanation.backend]


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """As `maxattn.explain`, for a `Problem`."""
    return _explain(problem, *asked(backend, eager_override()))


def list_backends() -> list[str]:
    """The names of all registered backends, the core's and those of plugins.

    Example:
        >>> import maxattn
        >>> {"naive", "sdpa"} <= set(maxattn.list_backends())
        True
    """
    return sorted(registry.backends())


def _explain(problem: Problem, asked_by: str, names: str | None) -> Explanation:
    asked_for = () if names is None else _split_names(names)
    known = registry.backends()
    answers = {name: _answer(backend, problem) for name, backend in known.items()}
    ranked = sorted(answers.values(), key=lambda answer: (not answer.able, -answer.relative_speed, answer.name))
    unknown = [Candidate(name, (_unknown(name, list(known)),), 0.0) for name in asked_for if name not in known]
    for candidate in unknown:
        log.warning("%s: %s", asked_by, candidate.reasons[0])
    pool = [answers[name] for name in asked_for if name in answers] if asked_for else ranked
    chosen = next((answer.name for answer in pool if answer.able), None)
    kernel = _kernel(known[chosen], problem) if chosen else ""
    return Explanation(problem, chosen, kernel, asked_by, asked_for, (*ranked, *unknown))


def _split_names(names: str) -> tuple[str, ...]:
    if not isinstance(names, str):
        raise TypeError(f"a backend is a name or a comma list of names, not {type(names).__name__}")
    parts = tuple(name.strip() for name in names.split(",") if name.strip())
    if not parts:
        raise ValueError(f"no backend name in {names!r}; known: {', '.join(list_backends())}")
    return parts


def _answer(backend: Backend, problem: Problem) -> Candidate:
    """A backend's answer; a crash inside it is a reason, told as such, so that it cannot stop the others."""
    try:
        reasons = backend.capabilities.unsupported(problem) or list(backend.unsupported(problem))
        for reason in reasons:
            if not isinstance(reason, Reason):
                raise TypeError(f"unsupported() must give instances of maxattn.Reason, not {reason!r}")
        speed = float(backend.relative_speed(problem)) if not reasons else 0.0
        if math.isnan(speed):
            raise ValueError("relative_speed() is not a number")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it may even leave the program
        log.warning("backend %s failed while it was asked about %s", backend.name, problem, exc_info=True)
        reasons, speed = [Reason("crashed", f"its own check failed: {registry.told(error)}")], 0.0
    return Candidate(backend.name, tuple(reasons), speed)


def _kernel(backend: Backend, problem: Problem) -> str:
    try:
        return backend.kernel(problem)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"unknown, {registry.told(error)}"


def _unknown(name: str, known: Sequence[str]) -> Reason:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return Reason("unknown", f"no backend is named {name!r}", f"{hint}known: {', '.join(sorted(known))}")


def _unavailable(explanation: Explanation) -> BackendUnavailableError:
    reasons = {candidate.name: list(candidate.reasons) for candidate in explanation.candidates}
    asked = explanation.asked_for or tuple(reasons)
    lines = [f"no backend can serve this problem: {explanation.problem}"]
    if explanation.asked_for:
        lines = [f"{explanation.asked_by} asked for {', '.join(asked)}, which cannot serve: {explanation.problem}"]
    lines += [f"  {name}: {reason}" for name in asked for reason in reasons[name]]
    able = [candidate.name for candidate in explanation.candidates if candidate.able]
    if able:
        lines.append(f"able here: {', '.join(able)}")
    elif not reasons:
        lines.append("  no backend is registered at all")
    return BackendUnavailableError("\n".join(lines), explanation.problem, {name: reasons[name] for name in asked})


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU, else None."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def execute(backend: Backend, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """Call the backend with autocast off: the dtype of `qkv` alone decides."""
    if problem.device in AUTOCAST_DEVICES and torch.is_autocast_enabled(problem.device):
        with torch.autocast(problem.device, enabled=False):
            return backend.attend(qkv, bias, problem)
    return backend.attend(qkv, bias, problem)
