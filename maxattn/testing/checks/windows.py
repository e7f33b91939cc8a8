"""Windows of every size."""

from __future__ import annotations

from itertools import cycle
from math import isqrt
from typing import Any

from maxattn.testing import strategies
from maxattn.testing.failure import NotApplicable
from maxattn.testing.registry import check
from maxattn.testing.subject import Subject

TOKENS = (1, 4, 49, 64, 100, 144, 196, 256, 784, 1024)
MANY_TOKENS = 256


@check("windows from 1 to 1,024 tokens, square and rectangular, full and cut off by the edge of the image")
def windows(subject: Subject) -> None:
    tried: list[dict[str, Any]] = []
    dtypes = cycle(strategies.dtypes(subject.facts))
    for tokens in TOKENS:
        for P_h in _squarest_divisors(tokens):
            P_w = tokens // P_h
            few = tokens > MANY_TOKENS
            window = {"window": (P_h, P_w), "heads": 1 if few else 3, "batch": 1 if few else 2}
            tried.append(window | {"height": 2 * P_h, "width": P_w})
            tried.append(window | {"height": 2 * P_h - P_h // 2, "width": P_w - P_w // 3, "dtype": next(dtypes)})
    subject.try_each(subject.variants(*tried), subject.verify)


@check("windows of any number of tokens from 65 to 1,024, with all that may vary")
def large_windows(subject: Subject) -> None:
    shapes = [(a, b) for a, b in subject.windows(1024) if 64 < a * b <= 1024]
    if not shapes:
        raise NotApplicable("no such window is declared")
    drawn = strategies.cases(subject.facts, subject.base, among=shapes, **strategies.ANYTHING)
    fewer = drawn.map(lambda case: case.but(batch=min(2, case.problem.batch or 1), heads=min(3, case.problem.heads)))
    subject.try_drawn(subject.served(fewer), subject.verify, share=0.3)


def _squarest_divisors(tokens: int) -> list[int]:
    """The two largest divisors that are at most the square root."""
    return [side for side in range(isqrt(tokens), 0, -1) if tokens % side == 0][:2]
