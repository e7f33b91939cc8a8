"""Candidates for one case: each is built, called, checked, and only then timed beside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from maxattn.bench.results import Case, Mode, Row
from maxattn.bench.timing import (
    OUT_OF_MEMORY,
    Call,
    Effort,
    Sampler,
    failure,
    free,
    graphs_mib,
    interleaved,
    peak_mib,
    release,
    seconds,
)

ALONE = "timed by itself, for memory does not suffice for all at once"
Show = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        make: builds it and returns the call that is timed. Whatever it raises becomes the row's note.
        wrong: what is wrong with the results of the call; empty if nothing is.
        extra_mib: of its memory, what is there before the call and belongs to it alone.
        attention: the backends that compute its attention, where they are ours.
        note: what to know about its time.
        shares_graphs: whether a compiler records CUDA graphs for it: these share their memory with those of others.
    """

    name: str
    make: Callable[[], Call]
    library: str = "maxattn"
    mode: Mode = ""
    wrong: Callable[[Call], str] = lambda call: ""
    extra_mib: Callable[[Call], float] = lambda call: 0.0
    attention: str = ""
    note: str = ""
    shares_graphs: bool = False


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
    """A row for each candidate: its time, or why it has none. The first half of the span builds, the second times.

    All are there at once and take turns. Those that memory does not suffice for are measured after the others, when
    nothing else is there; their rows say so.
    """
    rows = _together(case, candidates, device, effort, sampler, span)
    left_out = [one for one in candidates if rows[one.name].note == OUT_OF_MEMORY] if len(candidates) > 1 else []
    end = Span(span.show, span.start + span.length, 0.0)
    for candidate in left_out:
        release(device)
        row = _together(case, [candidate], device, effort, sampler, end)[candidate.name]
        rows[candidate.name] = (
            row if row.time is None else replace(row, note="; ".join(filter(None, (row.note, ALONE))))
        )
    return list(rows.values())


def _together(
    case: Case,
    candidates: Sequence[Candidate],
    device: str,
    effort: Effort,
    sampler: Callable[[Call], Sampler],
    span: Span,
) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    samplers: dict[str, Sampler] = {}
    recorded = False
    preparing, timing = span.part(0, 2), span.part(1, 2)
    for number, candidate in enumerate(candidates):
        preparing.tell(number / len(candidates), f"{candidate.name}: build and check")
        row, found = _prepared(case, candidate, device, sampler)
        rows[candidate.name] = replace(row, mib=None) if candidate.shares_graphs and recorded else row
        recorded |= candidate.shares_graphs
        if found is None:
            free(device)
        else:
            samplers[candidate.name] = found
    samples, expected = 0, max(1, effort.least * len(samplers))

    def done() -> None:
        nonlocal samples
        samples += 1
        timing.tell(samples / expected, "timing")

    def dropped(name: str, why: str) -> None:
        rows[name] = replace(rows[name], note=why)
        del samplers[name]
        free(device)

    times = interleaved(samplers, effort, done, dropped) if samplers else {}
    return {name: replace(row, time=times.get(name)) for name, row in rows.items()}


def _prepared(
    case: Case, candidate: Candidate, device: str, sampler: Callable[[Call], Sampler]
) -> tuple[Row, Sampler | None]:
    row = Row(
        case=case,
        candidate=candidate.name,
        library=candidate.library,
        mode=candidate.mode,
        attention=candidate.attention,
    )
    try:
        kept = graphs_mib(device)
        call = candidate.make()
        first_call = seconds(call, device)
        call()  # some record their CUDA graph in the first call and some in the second: afterwards all have
        wrong = candidate.wrong(call)
        if wrong:
            return replace(row, note=f"not timed, its results are wrong: {wrong}"), None
        mib = peak_mib(call, device) + graphs_mib(device) - kept + candidate.extra_mib(call)
        return replace(row, first_call=first_call, mib=mib, note=candidate.note), sampler(call)
    except NotMeasured as reason:
        note = str(reason)
    except Exception as error:  # of any library: it must not stop the others
        note = failure(error)
    return replace(row, note=note), None
