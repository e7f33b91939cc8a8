"""Samples are taken in turn, memory is counted to the byte, and what fails is told and stops nobody."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from maxattn.bench.compare import Candidate, NotMeasured, Span, compare, silent
from maxattn.bench.results import Time
from maxattn.bench.timing import Effort, interleaved, peak_mib, wall_clock

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


class TestCompare:
    def rows(self, *candidates: Candidate, span: Span | None = None) -> dict[str, tuple[bool, str]]:
        sampler = partial(wall_clock, device="cpu", effort=TWO_ROUNDS)
        found = compare({"batch": 1}, candidates, "cpu", TWO_ROUNDS, sampler, span or Span(silent))
        return {row.candidate: (row.time is not None, row.note) for row in found}

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

    def test_what_is_wrong_is_not_timed(self) -> None:
        calls = 0

        def call() -> int:
            nonlocal calls
            calls += 1
            return 5

        wrong = Candidate(name="wrong", make=lambda: call, wrong=lambda call: f"{call()}, not 4")
        assert self.rows(wrong) == {"wrong": (False, "not timed, its results are wrong: 5, not 4")}
        assert calls == 3  # the first one, the one whose memory is counted, and the one that is checked

    def test_memory_includes_what_the_candidate_keeps(self) -> None:
        keeps = Candidate(name="keeps", make=lambda: lambda: torch.zeros(2**18), extra_mib=lambda: 3.0)
        sampler = partial(wall_clock, device="cpu", effort=TWO_ROUNDS)
        (row,) = compare({}, [keeps], "cpu", TWO_ROUNDS, sampler, Span(silent))
        assert row.mib == pytest.approx(4, abs=0.01)

    def test_progress_only_grows_and_stays_in_its_span(self) -> None:
        shown: list[float] = []
        span = Span(lambda share, what: shown.append(share)).part(1, 2)
        self.rows(*(Candidate(name=name, make=lambda: lambda: None) for name in "ab"), span=span)
        assert shown == sorted(shown)
        assert 0.5 == shown[0] < shown[-1] <= 1.0
