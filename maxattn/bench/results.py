"""What a measurement gives, and how it is kept: a JSON file for each machine and kind."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from maxattn.bench.machine import Machine
from maxattn.weights.files import replacing

Kind = Literal["op", "model", "train", "scaling", "dispatch"]
Mode = Literal["", "eager", "compiled", "recorded"]
Case = dict[str, str | int]


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds a call: the median of `samples`, and their quartiles; None where they were not noted.

    Example:
        >>> time = Time.of([3.0, 1.0, 2.0])
        >>> time.median, time.low, time.high, time.samples
        (2.0, 1.5, 2.5, 3)
    """

    median: float
    low: float | None = None
    high: float | None = None
    samples: int = 0

    @classmethod
    def of(cls, samples: Sequence[float]) -> Time:
        if len(samples) == 1:
            return cls(median=samples[0], samples=1)
        low, median, high = statistics.quantiles(samples, method="inclusive")
        return cls(median=median, low=low, high=high, samples=len(samples))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate in one case. Without a `time` the `note` says why there is none.

    Attributes:
        case: what was computed, in an order that suits people; rows of the same case can be compared.
        candidate: who computed it; `library` is whose code that is.
        mode: "compiled" by `torch.compile`; "recorded", in training and `scaling`, as CUDA graphs.
        first_call: seconds of the very first call, which compiles.
        mib: the most memory that tensors took at once during a warm call, beyond what was there before, and what a
            CUDA graph of the call keeps; None for a compiler's graphs but the first, which share their memory.
        attention: the backends that computed its attention, where they are ours.
    """

    case: Case
    candidate: str
    library: str = ""
    mode: Mode = ""
    time: Time | None = None
    first_call: float | None = None
    mib: float | None = None
    attention: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The bytes that all layers of one kind must move in a case, and their floating point operations.

    `seconds` is what they take in the network made for inference, where it was measured.
    """

    case: Case
    kind: str
    bytes: int
    flops: int
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rows of one run of one kind of measurement.

    Attributes:
        checked: whether what was timed was checked before, in the same run.
        work: of the networks in `rows`, what bounds their time on this machine.
        finished: whether no case is left to be measured.
    """

    kind: Kind
    machine: Machine
    settings: dict[str, str | int | float] = field(default_factory=dict)
    checked: bool = False
    finished: bool = True
    rows: tuple[Row, ...] = ()
    work: tuple[Work, ...] = ()

    @property
    def file_name(self) -> str:
        """Of its own while it is not finished, so that an older one is there until it is."""
        return f"{self.machine.name}-{self.kind}{'' if self.finished else '-unfinished'}.json"

    def plus(self, rows: Iterable[Row], work: Iterable[Work] = ()) -> Result:
        """With what another case has given."""
        return replace(self, rows=(*self.rows, *rows), work=(*self.work, *work))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it."""
        found: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return found

    def write(self, folder: Path) -> Path:
        """Write it into `folder`, in the place of an older one of the same machine and kind; returns the path.

        One that is finished replaces one that is not, too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        with replacing(path) as temporary:
            temporary.write_bytes(_adapter().dump_json(self, indent=1) + b"\n")
        if self.finished:
            (folder / replace(self, finished=False).file_name).unlink(missing_ok=True)
        return path

    @staticmethod
    def read(path: Path) -> Result:
        """The result in a file.

        Raises:
            ValueError: for a file that holds none, naming it and what is wrong.
            OSError: for a file that cannot be read.
        """
        try:
            found: Result = _adapter().validate_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} holds no result of 'maxattn bench': {error}") from None
        return found


Keep = Callable[[Result], object]
"""Is given the result so far after each case, and at last the finished one."""


def lose(result: Result) -> None:
    """Keep nothing."""


def cases(rows: Sequence[Row]) -> list[tuple[Case, list[Row]]]:
    """The rows of each case, in the order in which they came.

    Example:
        >>> rows = [Row(case={"batch": n}, candidate=name) for name in "ab" for n in (1, 8)]
        >>> [(case, [row.candidate for row in found]) for case, found in cases(rows)]
        [({'batch': 1}, ['a', 'b']), ({'batch': 8}, ['a', 'b'])]
    """
    found: dict[tuple[tuple[str, str | int], ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.case.items()), []).append(row)
    return [(dict(case), group) for case, group in found.items()]


def told(case: Case) -> str:
    """A case in a line.

    Example:
        >>> told({"network": "nano", "batch": 8, "dtype": "float32"})
        'nano, batch 8, float32'
    """
    plain = ("network", "axis", "dtype", "pass", "attention")
    return ", ".join(str(value) if name in plain else f"{name} {value}" for name, value in case.items())


def _adapter() -> Any:
    """pydantic is imported only where results are read or written: it takes long."""
    from pydantic import TypeAdapter

    return TypeAdapter(Result)
