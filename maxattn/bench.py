"""Measurements, with a stamp of the machine they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from timeit import Timer

import torch
from torch import Tensor

from maxattn import __version__
from maxattn.ops.contract import Backend, Problem
from maxattn.ops.dispatch import ENVIRONMENT_VARIABLE, use_backend
from maxattn.ops.max_sa import explain, max_sa
from maxattn.ops.registry import registered

GOAL_US = 5.0
"""What a cached choice may add to an eager call, in microseconds."""


@dataclass(frozen=True)
class Machine:
    """What a measurement ran on and when."""

    cpu: str
    cores: int
    python: str
    torch: str
    maxattn: str
    date: str

    def __str__(self) -> str:
        versions = f"python {self.python}, torch {self.torch}, maxattn {self.maxattn}"
        return f"{self.cpu}, {self.cores} cores, {versions}, {self.date}"


@dataclass(frozen=True)
class Cost:
    """One way to ask for a backend: a call of `max_sa`, and what of it the choice adds; medians in microseconds.

    `low` and `high` are the quartiles of what is added.
    """

    asked_by: str
    call: float
    added: float
    low: float
    high: float


@dataclass(frozen=True)
class DispatchCost:
    """What choosing a backend adds to each eager call; `direct` is the call without it, in microseconds."""

    machine: Machine
    goal: float
    rounds: int
    calls: int
    direct: float
    costs: tuple[Cost, ...]


class _Nothing(Backend):
    """Does no work, so that only the way to it is measured; first in the automatic choice."""

    name = "nothing"

    def relative_speed(self, problem: Problem) -> float:
        return float("inf")

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return qkv


def machine() -> Machine:
    """The stamp of this machine, now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Machine(cpu_model(), cores, platform.python_version(), torch.__version__, __version__, date)


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def device_types() -> list[str]:
    """The kinds of device that torch can use here: the CPU, then the accelerator if there is one.

    Example:
        >>> device_types()[0]
        'cpu'
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def dispatch_cost(rounds: int = 100, calls: int = 200) -> DispatchCost:
    """Measure `max_sa` with a backend that does nothing against a direct call of its `attend`.

    Each round times `calls` calls of each kind in turn, so that what disturbs the machine disturbs all of them; the
    cost of a choice is the median over the rounds of its difference from the direct call of the same round.

    Example:
        >>> result = dispatch_cost(rounds=3, calls=10)
        >>> [cost.asked_by for cost in result.costs]
        ['automatic', 'backend argument', 'use_backend', 'MAXATTN_BACKEND']
    """
    qkv, bias, window = torch.randn(1, 56, 56, 3, 2, 32), torch.randn(2, 49, 49), (7, 7)
    with registered(_Nothing()) as backend, _asking(None, None):
        problem = explain(qkv, "block", window, bias, backend=backend.name).problem
        automatic = partial(max_sa, qkv, "block", window, bias)
        kinds: dict[str, tuple[Callable[[], Tensor], str | None, str | None]] = {
            "direct": (partial(backend.attend, qkv, bias, problem), None, None),
            "automatic": (automatic, None, None),
            "backend argument": (partial(automatic, backend=backend.name), None, None),
            "use_backend": (automatic, backend.name, None),
            ENVIRONMENT_VARIABLE: (automatic, None, backend.name),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, (call, context, environment) in kinds.items():
                with _asking(context, environment):
                    times[kind].append(_microseconds(call, calls))
    direct = times.pop("direct")
    costs = tuple(_cost(kind, measured, direct) for kind, measured in times.items())
    return DispatchCost(machine(), GOAL_US, rounds, calls, statistics.median(direct), costs)


def _cost(asked_by: str, measured: list[float], direct: list[float]) -> Cost:
    added = [one - other for one, other in zip(measured, direct, strict=True)]
    low, median, high = statistics.quantiles(added, method="inclusive")
    return Cost(asked_by, statistics.median(measured), median, low, high)


def _microseconds(call: Callable[[], Tensor], calls: int) -> float:
    call()
    return Timer(call).timeit(calls) / calls * 1e6


@contextmanager
def _asking(context: str | None, environment: str | None) -> Iterator[None]:
    """Ask for a backend by `use_backend` and by the environment as given, and by nothing else."""
    before = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    if environment is not None:
        os.environ[ENVIRONMENT_VARIABLE] = environment
    try:
        with use_backend(context):
            yield
    finally:
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        if before is not None:
            os.environ[ENVIRONMENT_VARIABLE] = before
