"""What choosing a backend adds to each call of `max_sa`: eager, and in compiled code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from maxattn.bench.compare import Show, silent
from maxattn.bench.machine import this_machine
from maxattn.bench.results import Keep, Mode, Result, Row, Time, lose
from maxattn.bench.timing import seconds
from maxattn.ops.contract import Backend, Problem
from maxattn.ops.dispatch import ENVIRONMENT_VARIABLE, use_backend
from maxattn.ops.max_sa import explain, max_sa
from maxattn.ops.registry import registered

GOAL_US = 5.0
"""What a cached choice may add to an eager call, in microseconds."""
DIRECT = "attend, called directly"
ADDED, CALL = "added by the choice", "one call"

Attend = Callable[[], Tensor]
Asking = Callable[[], AbstractContextManager[None]]


class _Nothing(Backend):
    """Does no work, so that only the way to it is measured; first in the automatic choice."""

    name = "nothing"

    def relative_speed(self, problem: Problem) -> float:
        return float("inf")

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return qkv


class _OneOperation(_Nothing):
    """One operation, for a compiler leaves a function without any alone."""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return _values(qkv)


def measure(rounds: int = 100, calls: int = 200, show: Show = silent, keep: Keep = lose) -> Result:
    """`max_sa` with a backend that does nothing, against a direct call of its `attend`.

    Each round times `calls` calls of each kind in turn, so that what disturbs the machine disturbs all of them; what a
    choice adds is the median over the rounds of its difference from the direct call of the same round. Compiled, the
    choice is made while tracing: the row's note tells by how many operations the graph differs from that of the
    backend's work alone. The time is that of the guards, which notice if another backend is asked for: a compiled
    function checks them once a call, whatever number of layers it holds.

    Example:
        >>> result = measure(rounds=3, calls=10)
        >>> [row.candidate for row in result.rows if row.case == {"measured": "added by the choice"}]
        ['automatic', 'backend argument', 'use_backend', 'MAXATTN_BACKEND', 'compiled']
    """
    qkv, bias, window = torch.randn(1, 56, 56, 3, 2, 32), torch.randn(2, 49, 49), (7, 7)
    show(0.0, "eager calls")
    with registered(_Nothing()) as backend, _asking(None, None):
        problem = explain(qkv, "block", window, bias, backend=backend.name).problem
        automatic = partial(max_sa, qkv, "block", window, bias)
        eager: dict[str, tuple[Attend, Asking]] = {
            DIRECT: (partial(backend.attend, qkv, bias, problem), partial(_asking, None, None)),
            "automatic": (automatic, partial(_asking, None, None)),
            "backend argument": (partial(automatic, backend=backend.name), partial(_asking, None, None)),
            "use_backend": (automatic, partial(_asking, backend.name, None)),
            ENVIRONMENT_VARIABLE: (automatic, partial(_asking, None, backend.name)),
        }
        rows = _rows("eager", _samples(eager, rounds, calls))
    show(0.5, "compiled calls")
    with registered(_OneOperation()), _asking(None, None):
        rows += _compiled(qkv, bias, window, rounds, calls)
    settings: dict[str, str | int | float] = {"goal_us": GOAL_US, "rounds": rounds, "calls": calls}
    result = Result(kind="dispatch", machine=this_machine(), settings=settings, rows=tuple(rows))
    keep(result)
    return result


def _values(qkv: Tensor) -> Tensor:
    return qkv[:, :, :, 0].clone()


def _compiled(qkv: Tensor, bias: Tensor, window: tuple[int, int], rounds: int, calls: int) -> list[Row]:
    graphs: dict[str, list[str]] = {}

    def compiled(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Attend:
        def keep(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
            graphs[name] = [str(node.target) for node in graph.graph.nodes if node.op.startswith("call_")]
            return graph.forward

        return partial(torch.compile(function, backend=keep, fullgraph=True), qkv, bias)

    functions: Mapping[str, tuple[Attend, Asking]] = {
        DIRECT: (compiled(DIRECT, lambda qkv, bias: _values(qkv)), nullcontext),
        "compiled": (compiled("compiled", lambda qkv, bias: max_sa(qkv, "block", window, bias)), nullcontext),
    }
    found = _rows("compiled", _samples(functions, rounds, calls))
    more = len(graphs["compiled"]) - len(graphs[DIRECT])
    note = f"{more} operations more in the graph" if more else "the graph is the same"
    torch.compiler.reset()
    return [replace(row, note=note) if row.candidate == "compiled" else row for row in found]


def _samples(kinds: Mapping[str, tuple[Attend, Asking]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds a call of each kind, a sample a round."""
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (call, asking) in kinds.items():
            with asking():
                call()
                samples[kind].append(seconds(call, "cpu", calls))
    return samples


def _rows(mode: Mode, samples: dict[str, list[float]]) -> list[Row]:
    direct = samples[DIRECT]
    whole = [
        Row(case={"measured": f"{CALL}, {mode}"}, candidate=kind, library="maxattn", mode=mode, time=Time.of(times))
        for kind, times in samples.items()
    ]
    return whole + [
        Row(
            case={"measured": ADDED},
            candidate=kind,
            library="maxattn",
            mode=mode,
            time=Time.of([one - other for one, other in zip(times, direct, strict=True)]),
        )
        for kind, times in samples.items()
        if kind != DIRECT
    ]


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
