"""A backend that counts how often it is asked and used, and calls that show which one was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

import maxattn
from maxattn import Backend, Problem, Reason
from maxattn.ops import registry
from maxattn.ops.naive import Naive
from maxattn.ops.registry import registered

QKV = torch.randn(1, 8, 8, 3, 2, 4, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))


class Recording(Naive):
    """`naive` under another name, that counts how often it is asked and how often it is used."""

    def __init__(self, name: str, *reasons: Reason, speed: float = 0.01) -> None:
        self.name = name
        self.reasons = reasons
        self.speed = speed
        self.asked = 0
        self.used = 0

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        self.asked += 1
        return self.reasons

    def relative_speed(self, problem: Problem) -> float:
        return self.speed

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        self.used += 1
        return super().attend(qkv, bias, problem)


@contextmanager
def recording(*backends: Backend) -> Iterator[None]:
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(registered(backend))
        yield


def attend(qkv: Tensor = QKV, *, bias: Tensor | None = None, **changed: Any) -> Tensor:
    return maxattn.max_sa(qkv, **({"axis": "block", "window": 4, "bias": bias} | changed))


def chosen(**changed: Any) -> str:
    """Which of the recording backends, and of the core's, one call uses; `explain` must say the same."""
    explanation = maxattn.explain(QKV, "block", 4, **changed)
    recorders = [backend for backend in registry.backends().values() if isinstance(backend, Recording)]
    before = {backend.name: backend.used for backend in recorders}
    attend(**changed)
    used = [backend.name for backend in recorders if backend.used > before[backend.name]]
    assert used == [name for name in before if name == explanation.backend]
    assert explanation.backend is not None
    return explanation.backend
