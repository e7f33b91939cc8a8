"""Candidates for one case: each is built, called once, checked, and only then timed beside the others."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from maxattn.bench.results import Case, Mode, Row
from maxattn.bench.timing import Call, Effort, Sampler, failure, interleaved, peak_mib, seconds

Show = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        make: builds it and returns the call that is timed. Whatever it raises becomes the row's note.
        wrong: what is wrong with the results of the call; empty if nothing is.
        extra_mib: of its memory, what is there before the call and belongs to it alone.
        note: what to know about its time.
    """

    name: str
    make: Callable[[], Call]
    library: str = "maxattn"
    mode: Mode = ""
    wrong: Callable[[Call], str] = lambda call: ""
    extra_mib: Callable[[], float] = lambda: 0.0
    note: str = ""


class NotMeasured(Exception):  # noqa: N818 - no error
    """Why a candidate is not measured, in words for its row."""


class Span(NamedTuple):
    """A part of all that is to be done, from 0 to 1, and who shows how far it is."""

    show: Show
    start: float = 0.0
    length: float = 1.0

    def part(self, number: int, count: int) -> Span:
        """The `number`-th of `count` equal parts."""
        return Span(self.show, self.start + self.length * number / count, self.length / count)

    def tell(self, share: float, what: str) -> None:
        """That `share` of this span is done, and what comes now."""
        self.show(self.start + self.length * min(share, 1.0), what)


def silent(share: float, what: str) -> None:
    """Show nothing."""


def compare(
    case: Case,
    candidates: Sequence[Candidate],
    device: str,
    effort: Effort,
    sampler: Callable[[Call], Sampler],
    span: Span,
) -> list[Row]:
    """A row for each candidate: its time, or why it has none. The first half of the span builds, the second times."""
    rows: list[Row] = []
    samplers: dict[str, Sampler] = {}
    preparing, timing = span.part(0, 2), span.part(1, 2)
    for number, candidate in enumerate(candidates):
        preparing.tell(number / len(candidates), f"{candidate.name}: build and check")
        row, found = _prepared(case, candidate, device, sampler)
        rows.append(row)
        if found is not None:
            samplers[candidate.name] = found
    samples, expected = 0, max(1, effort.least * len(samplers))

    def done() -> None:
        nonlocal samples
        samples += 1
        timing.tell(samples / expected, "timing")

    times = interleaved(samplers, effort, done) if samplers else {}
    return [replace(row, time=times.get(row.candidate)) for row in rows]


def _prepared(
    case: Case, candidate: Candidate, device: str, sampler: Callable[[Call], Sampler]
) -> tuple[Row, Sampler | None]:
    row = Row(case=case, candidate=candidate.name, library=candidate.library, mode=candidate.mode)
    try:
        call = candidate.make()
        first_call = seconds(call, device)
        mib = peak_mib(call, device)  # now, for the second call records a CUDA graph, and later ones allocate nothing
        wrong = candidate.wrong(call)
        if wrong:
            return replace(row, note=f"not timed, its results are wrong: {wrong}"), None
        mib += candidate.extra_mib()
        return replace(row, first_call=first_call, mib=mib, note=candidate.note), sampler(call)
    except NotMeasured as reason:
        note = str(reason)
    except Exception as error:  # of any library: it must not stop the others
        note = failure(error)
    gc.collect()
    return replace(row, note=note), None
