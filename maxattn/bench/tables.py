"""Markdown tables of results, one function a kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from maxattn.bench.dispatch import ADDED
from maxattn.bench.results import Case, Result, Row, Time, Work, cases, told
from maxattn.bench.scaling import FULL, WINDOWS, exponent, pixels

OURS = "maxattn"
FLOOR = "floor"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: int) -> str:
    """Markdown; all but the first columns, `right` of them, aligned to the right.

    Example:
        >>> print(table(("name", "ms"), [("a", "1.0")], right=1))
        | name | ms |
        |---|--:|
        | a | 1.0 |
    """
    rules = ["---"] * (len(header) - right) + ["--:"] * right
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in escaped)]
    return "\n".join(lines)


def short(value: float) -> str:
    """A number to three digits.

    Example:
        >>> short(0.01234), short(1.234), short(123.4), short(12345.6)
        ('0.0123', '1.23', '123', '12,346')
    """
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, in the unit that suits them.

    Example:
        >>> duration(0.0000021), duration(0.0345), duration(75)
        ('2.1 us', '34.5 ms', '75 s')
    """
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if abs(seconds) * factor < 1000:
            return f"{short(seconds * factor)} {unit}"
    return f"{short(seconds)} s"


def spread(time: Time) -> str:
    """The quartiles; a dash where they were not noted."""
    return "-" if time.low is None or time.high is None else f"{duration(time.low)} to {duration(time.high)}"


def give_or_take(time: Time) -> str:
    """Half the distance of the quartiles, in per cent of the median; nothing where they were not noted.

    Example:
        >>> give_or_take(Time(median=2.0, low=1.9, high=2.3, samples=5))
        ' ±10%'
    """
    if time.low is None or time.high is None or time.median == 0:
        return ""
    return f" ±{short(50 * (time.high - time.low) / time.median)}%"


def op(result: Result) -> str:
    """A table a pass: times of all backends, and how many times the floor they take; then the memory."""
    parts = []
    for what in dict.fromkeys(str(row.case["pass"]) for row in result.rows):
        rows = [row for row in result.rows if row.case["pass"] == what]
        parts.append(
            f"**{what}**: microseconds, and in brackets how many times the floor\n\n{_wide(rows, _with_ratio)}"
        )
        if any(row.mib for row in rows):
            parts.append(f"**{what}**: peak memory beyond the inputs, MiB\n\n{_wide(rows, _mib, leave_out=('floor',))}")
    return "\n\n".join([*parts, *_notes(result.rows)])


def networks(result: Result) -> str:
    """Of `model` and `train`: a table a case, and how many times as fast the fastest of ours is as each library's."""
    parts = []
    for case, rows in cases(result.rows):
        timed = [row for row in rows if row.time is not None]
        lines = [
            (
                row.candidate,
                duration(row.time.median),
                spread(row.time),
                short(_batch(case) / row.time.median),
                "-" if row.mib is None else short(row.mib),
                "-" if row.first_call is None else duration(row.first_call),
            )
            for row in timed
            if row.time is not None
        ]
        header = ("network", "median", "quartiles", "images/s", "peak MiB", "first call")
        parts.append(f"#### {told(case)}\n\n{table(header, lines, right=5)}")
        parts += _faster(timed)
        parts += _floor_of([work for work in result.work if work.case == case], result, timed)
        parts += [*_attention(rows), *_notes(rows)]
    return "\n\n".join(parts)


def scaling(result: Result) -> str:
    """Times and memory of both kinds of attention by size, and the exponents that fit them."""
    header = ("pixels", *(f"{kind}, {what}" for kind in (WINDOWS, FULL) for what in ("time", "MiB")))
    lines = []
    for case, rows in cases(result.rows):
        of = {row.candidate: row for row in rows}
        cells = []
        for kind in (WINDOWS, FULL):
            row = of.get(kind)
            cells += ["-", "-"] if row is None or row.time is None else [_duration(row.time), _mib(row, None)]
        size = str(case["img_size"])
        lines.append((size if "x" in size else f"{size} x {size}", *cells))
    facts = {name: value for name, value in result.rows[0].case.items() if name != "img_size"} if result.rows else {}
    return "\n\n".join(
        [
            told(facts),
            table(header, lines, right=4),
            *_exponents(result),
            *_attention(result.rows),
            *_notes(result.rows, "img_size"),
        ]
    )


def dispatch(result: Result) -> str:
    """What the choice adds to a call, by who asked for the backend."""
    lines = [
        (row.candidate, duration(row.time.median), spread(row.time), row.note)
        for row in result.rows
        if row.case["measured"] == ADDED and row.time is not None
    ]
    goal = result.settings.get("goal_us", 5)
    text = f"What the choice adds to a call; the goal of an eager one is {goal:g} us, of a compiled one the same graph."
    return f"{text}\n\n{table(('choice asked by', 'added', 'quartiles', ''), lines, right=3)}"


def slopes(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """By candidate and "time" or "mib", the exponent over the larger half of its images, three at least."""
    found = {}
    for name in (WINDOWS, FULL):
        timed = sorted((row for row in rows if row.candidate == name and row.time is not None), key=pixels)
        larger = timed[-max(3, len(timed) // 2) :]
        for what in ("time", "mib"):
            slope = exponent(larger, what)
            if slope is not None:
                found[name, what] = slope
    return found


def _exponents(result: Result) -> list[str]:
    lines = [
        (name, short(found[name, "time"]), short(found[name, "mib"]))
        for found in [slopes(result.rows)]
        for name in (WINDOWS, FULL)
        if (name, "time") in found and (name, "mib") in found
    ]
    told_as = "Cost grows as pixels to the power of (fitted to the larger half of the images, three at least):"
    return [f"{told_as}\n\n{table(('', 'time', 'memory'), lines, right=2)}"] if lines else []


def _faster(rows: Sequence[Row]) -> list[str]:
    """How many times as fast our fastest is as each library's fastest, in either mode and in the better of both."""
    libraries = [name for name in dict.fromkeys(row.library for row in rows) if name not in (OURS, FLOOR)]
    modes: list[str] = [*dict.fromkeys(row.mode for row in rows if row.mode)]
    modes += ["the better"] if len(modes) > 1 else []
    lines = []
    for mode in modes:
        ours = _fastest(rows, OURS, mode)
        theirs = [_fastest(rows, library, mode) for library in libraries]
        if ours is not None and any(other is not None for other in theirs):
            lines.append((mode, *("-" if other is None else f"{other / ours:.2f}" for other in theirs)))
    if not lines:
        return []
    header = ("", *(f"times as fast as {library}" for library in libraries))
    return [
        f"The fastest of ours beside the fastest of each library's:\n\n{table(header, lines, right=len(libraries))}"
    ]


def _fastest(rows: Sequence[Row], library: str, mode: str) -> float | None:
    times = [
        row.time.median
        for row in rows
        if row.time is not None and row.library == library and mode in (row.mode, "the better")
    ]
    return min(times, default=None)


def _floor_of(work: Sequence[Work], result: Result, timed: Sequence[Row]) -> list[str]:
    """What bounds the network made for inference, by kind of layer, and how far the fastest of ours is from that."""
    rates = [result.settings.get(name) for name in ("bytes_per_second", "flops_per_second")]
    moving, computing = (rate if isinstance(rate, (int, float)) else math.inf for rate in rates)
    if not work or moving == computing == math.inf:
        return []
    floors = [max(one.bytes / moving, one.flops / computing) for one in work]
    measured = any(one.seconds is not None for one in work)

    def line(kind: str, moved: int, flops: int, floor: float, seconds: float | None) -> tuple[str, ...]:
        cells = (kind, short(moved / 1e9), short(flops / 1e9), duration(floor))
        if not measured:
            return cells
        return (*cells, *(("-", "-") if seconds is None else (duration(seconds), duration(seconds - floor))))

    lines = [line(one.kind, one.bytes, one.flops, floor, one.seconds) for one, floor in zip(work, floors, strict=True)]
    floor, seconds = sum(floors), sum(one.seconds or 0.0 for one in work)
    lines.append(line("all", sum(one.bytes for one in work), sum(one.flops for one in work), floor, seconds))
    best = min((row.time.median for row in timed if row.time and row.library == OURS), default=None)
    text = "What must be moved and computed, and the floor"
    text += "" if best is None else f"; the fastest of ours takes {best / floor:.2f} times that of all"
    header = ("layers", "GB", "GFLOP", "floor", *(("measured", "above the floor") if measured else ()))
    return [f"{text}:\n\n{table(header, lines, right=len(header) - 1)}"]


def _attention(rows: Sequence[Row]) -> list[str]:
    """Which backend computed the attention of which candidates."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.time is not None and row.attention:
            found.setdefault(row.attention, {})[row.candidate] = None
    return ["\n".join(f"- attention by {name}: {'; '.join(whose)}" for name, whose in found.items())] if found else []


def _duration(time: Time) -> str:
    return duration(time.median) + give_or_take(time)


def _wide(rows: Sequence[Row], cell: object, leave_out: Sequence[str] = ()) -> str:
    """A line a case, a column a candidate that was timed somewhere."""
    names = [
        name for name in dict.fromkeys(row.candidate for row in rows if row.time is not None) if name not in leave_out
    ]
    lines = []
    for case, found in cases(rows):
        of = {row.candidate: row for row in found}
        cells = [cell(of[name], of.get(FLOOR)) if name in of else "" for name in names]  # type: ignore[operator]
        lines.append((*(str(value) for name, value in case.items() if name != "pass"), *cells))
    header = [name for name in rows[0].case if name != "pass"]
    return table([*header, *names], lines, right=len(names))


def _with_ratio(row: Row, floor: Row | None) -> str:
    if row.time is None:
        return "-"
    time = short(row.time.median * 1e6) + give_or_take(row.time)
    if floor is None or floor.time is None or row is floor:
        return time
    return f"{time} ({row.time.median / floor.time.median:.2f})"


def _mib(row: Row, floor: Row | None) -> str:
    return "-" if row.mib is None else short(row.mib)


def _notes(rows: Sequence[Row], fact: str = "") -> list[str]:
    """Each note once, with the candidate that it is about, and that `fact` of its case, if one is named."""
    lines = dict.fromkeys(
        f"- {row.candidate}{f' at {row.case[fact]}' if fact else ''}: {row.note}" for row in rows if row.note
    )
    return ["\n".join(lines)] if lines else []


def _batch(case: Case) -> int:
    return int(case["batch"])


OF_KIND = {"op": op, "model": networks, "train": networks, "scaling": scaling, "dispatch": dispatch}
