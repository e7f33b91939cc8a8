"""Samples are taken in turn, memory is counted to the byte, and what fails is told and stops nobody."""

from __future__ import annotations

import time
import weakref
from contextlib import suppress
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

from maxattn.bench.compare import ALONE, Candidate, NotMeasured, Span, compare, silent
from maxattn.bench.results import Row, Time
from maxattn.bench.timing import Call, Effort, captured, fastest_convolutions, interleaved, peak_mib, wall_clock

TWO_ROUNDS = Effort(least=2, most=2, sample=0)


def test_samples_are_taken_in_turn_and_every_second_round_backwards() -> None:
    order: list[str] = []

    def sampler(name: str) -> float:
        order.append(name)
        return float(len(order))

    times = interleaved({name: partial(sampler, name) for name in "abc"}, Effort(least=3, most=3))
    assert "".join(order) == "abccbaabc"
    assert times["a"] == Time.of([1.0, 6.0, 7.0])


@pytest.mark.parametrize(
    ("effort", "rounds"),
    [
        pytest.param(Effort(seconds=0, least=4, most=9), 4, id="at-least"),
        pytest.param(Effort(seconds=1000, least=1, most=6), 6, id="at-most"),
    ],
)
def test_rounds_stay_within_their_limits(effort: Effort, rounds: int) -> None:
    assert interleaved({"a": lambda: 1.0}, effort)["a"].samples == rounds


def test_rounds_end_when_their_time_is_over() -> None:
    def sampler() -> float:
        time.sleep(0.02)
        return 1.0

    assert interleaved({"a": sampler}, Effort(seconds=0.05, least=1, most=10_000))["a"].samples < 10


def test_what_a_graph_reads_is_kept_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is a mock: there is none here, and it is the tensors that matter."""
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    inputs = torch.ones(2)
    there = weakref.ref(inputs)
    replay = captured(partial(torch.neg, inputs))
    del inputs
    replay()
    assert there() is not None
    del replay
    assert there() is None


def test_a_short_call_is_repeated_within_a_sample() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.001)

    sample = wall_clock(call, "cpu", Effort(sample=0.01))
    calls = 0
    assert sample() >= 0.001
    assert 1 < calls <= 10


def test_one_sample_has_no_quartiles_and_several_have() -> None:
    assert Time.of([2.0]) == Time(median=2.0, samples=1)
    assert Time.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Time(median=3.0, low=2.0, high=4.0, samples=5)


def test_peak_memory_is_what_lives_at_once_beyond_what_was_there() -> None:
    mebibyte = torch.zeros(2**18)

    def call() -> torch.Tensor:
        first = mebibyte + 1
        second = first * 2
        del first
        third = second * 2  # only ever two of the three at once
        del second
        return third.sum()

    assert peak_mib(call, "cpu") == pytest.approx(2, abs=0.01)


def test_peak_memory_counts_the_backward_pass() -> None:
    x = torch.zeros(2**18, requires_grad=True)
    assert peak_mib(x.exp, "cpu") == pytest.approx(1, abs=0.01)
    assert peak_mib(lambda: torch.autograd.grad(x.exp().sum(), x), "cpu") == pytest.approx(2, abs=0.01)


def test_who_fails_while_timed_loses_only_its_own_time() -> None:
    turns: list[str] = []

    def sampler(name: str) -> float:
        turns.append(name)
        if name == "b" and turns.count("b") == 2:
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        return 1.0

    dropped: list[tuple[str, str]] = []
    samplers, four = {name: partial(sampler, name) for name in "ab"}, Effort(least=4, most=4)
    times = interleaved(samplers, four, dropped=lambda name, why: dropped.append((name, why)))
    assert "".join(turns) == "abbaaa"
    assert {name: time.samples for name, time in times.items()} == {"a": 4}
    assert dropped == [("b", "out of memory")]


def test_a_failure_that_nobody_asks_about_is_the_callers() -> None:
    def sampler() -> float:
        raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        interleaved({"copy": sampler}, TWO_ROUNDS)


def test_convolutions_are_tuned_within_the_block_alone() -> None:
    assert not torch.backends.cudnn.benchmark
    with suppress(KeyboardInterrupt), fastest_convolutions():
        assert torch.backends.cudnn.benchmark
        raise KeyboardInterrupt
    assert not torch.backends.cudnn.benchmark


class Store:
    """A device with room for so many networks."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.networks: weakref.WeakSet[Network] = weakref.WeakSet()

    def put(self, in_calls: int = 0) -> Call:
        return Network(self, in_calls)


class Network:
    """Takes one place, and `in_calls` more while it is called by the timer, after the calls that prepare it."""

    def __init__(self, store: Store, in_calls: int) -> None:
        self.store, self.in_calls, self.calls = store, in_calls, 0
        self.take(1)
        store.networks.add(self)

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > PREPARING:
            self.take(self.in_calls)

    def take(self, places: int) -> None:
        if len(self.store.networks) + places > self.store.room:
            raise torch.OutOfMemoryError("no room")


PREPARING = 3
"""The first call, that after which all are warm, and the one whose memory is counted."""


class TestCompare:
    def found(self, *candidates: Candidate, span: Span | None = None) -> dict[str, Row]:
        sampler = partial(wall_clock, device="cpu", effort=TWO_ROUNDS)
        rows = compare({"batch": 1}, candidates, "cpu", TWO_ROUNDS, sampler, span or Span(silent))
        return {row.candidate: row for row in rows}

    def rows(self, *candidates: Candidate, span: Span | None = None) -> dict[str, tuple[bool, str]]:
        return {name: (row.time is not None, row.note) for name, row in self.found(*candidates, span=span).items()}

    def test_what_raises_is_told_and_stops_no_other(self) -> None:
        def fail() -> None:
            raise RuntimeError("no such kernel")

        def missing() -> None:
            raise NotMeasured("not installed: pip install other")

        rows = self.rows(
            Candidate(name="broken", make=fail),
            Candidate(name="broken when called", make=lambda: fail),
            Candidate(name="missing", make=missing),
            Candidate(name="fine", make=lambda: lambda: None, note="of another kind"),
        )
        assert rows == {
            "broken": (False, "RuntimeError: no such kernel"),
            "broken when called": (False, "RuntimeError: no such kernel"),
            "missing": (False, "not installed: pip install other"),
            "fine": (True, "of another kind"),
        }

    def test_what_fails_only_while_timed_stops_no_other(self) -> None:
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            if calls > PREPARING:
                raise RuntimeError("the device is lost")

        rows = self.rows(Candidate(name="late", make=lambda: call), Candidate(name="fine", make=lambda: lambda: None))
        assert rows == {"late": (False, "RuntimeError: the device is lost"), "fine": (True, "")}

    def test_those_that_memory_does_not_suffice_for_are_timed_by_themselves(self) -> None:
        store = Store(room=2)
        rows = self.rows(*(Candidate(name=name, make=store.put, note=name.upper()) for name in "abcd"))
        assert rows == {
            "a": (True, "A"),
            "b": (True, "B"),
            "c": (True, f"C; {ALONE}"),
            "d": (True, f"D; {ALONE}"),
        }
        assert not store.networks

    def test_who_takes_too_much_while_timed_is_timed_by_itself(self) -> None:
        store = Store(room=2)
        rows = self.rows(
            Candidate(name="small", make=store.put), Candidate(name="large", make=partial(store.put, in_calls=1))
        )
        assert rows == {"small": (True, ""), "large": (True, ALONE)}

    def test_who_has_no_room_even_alone_says_so(self) -> None:
        small, huge = Store(room=1), Store(room=0)
        rows = self.rows(Candidate(name="fits", make=small.put), Candidate(name="huge", make=huge.put))
        assert rows == {"fits": (True, ""), "huge": (False, "out of memory")}

    def test_what_is_wrong_is_not_timed(self) -> None:
        calls = 0

        def call() -> int:
            nonlocal calls
            calls += 1
            return 5

        wrong = Candidate(name="wrong", make=lambda: call, wrong=lambda call: f"{call()}, not 4")
        assert self.rows(wrong) == {"wrong": (False, "not timed, its results are wrong: 5, not 4")}
        assert calls == 3  # the first one, the one after which all are warm, and the one that is checked

    def test_memory_includes_what_the_candidate_keeps(self) -> None:
        keeps = Candidate(name="keeps", make=lambda: lambda: torch.zeros(2**18), extra_mib=lambda call: 3.0)
        assert self.found(keeps)["keeps"].mib == pytest.approx(4, abs=0.01)

    @pytest.mark.parametrize("recording", [1, 2])
    def test_memory_is_that_of_a_warm_call_whichever_call_records(self, recording: int) -> None:
        calls = 0

        def call() -> torch.Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros(2**21 if calls <= recording else 2**18)

        assert self.found(Candidate(name="records", make=lambda: call))["records"].mib == pytest.approx(1, abs=0.01)

    def test_progress_only_grows_and_stays_in_its_span(self) -> None:
        shown: list[float] = []
        span = Span(lambda share, what: shown.append(share)).part(1, 2)
        self.rows(*(Candidate(name=name, make=lambda: lambda: None) for name in "ab"), span=span)
        assert shown == sorted(shown)
        assert 0.5 == shown[0] < shown[-1] <= 1.0


def test_of_graphs_that_a_compiler_records_only_the_first_ones_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = iter((0, 7, 7, 9, 9, 9))
    monkeypatch.setattr("maxattn.bench.compare.graphs_mib", lambda device: next(kept))
    candidates = [
        Candidate(name=name, make=lambda: lambda: None, shares_graphs=graphs)
        for name, graphs in (("recorded", True), ("recorded later", True), ("not recorded", False))
    ]
    sampler = partial(wall_clock, device="cpu", effort=TWO_ROUNDS)
    rows = compare({}, candidates, "cpu", TWO_ROUNDS, sampler, Span(silent))
    assert [row.mib for row in rows] == [7, None, 0]
