"""`maxattn bench dispatch`: what a choice adds is a difference, and nothing is left changed."""

from __future__ import annotations

import os

import pytest
import torch

import maxattn
from maxattn.bench.dispatch import ADDED, DIRECT, measure
from maxattn.bench.results import Row

ASKED_BY = ["automatic", "backend argument", "use_backend", "MAXATTN_BACKEND"]


def of(rows: tuple[Row, ...], measured: str) -> dict[str, Row]:
    return {row.candidate: row for row in rows if row.case["measured"] == measured}


def test_the_cost_of_a_choice_is_what_a_call_takes_beyond_its_backend() -> None:
    rows = measure(rounds=20, calls=50).rows
    added, calls = of(rows, ADDED), of(rows, "one call, eager")
    assert list(added) == [*ASKED_BY, "compiled"]
    assert list(calls) == [DIRECT, *ASKED_BY]
    direct = calls[DIRECT].time
    assert direct is not None
    for name in ASKED_BY:
        cost, call = added[name].time, calls[name].time
        assert cost is not None
        assert call is not None
        assert cost.low is not None
        assert cost.high is not None
        assert 0 < cost.low <= cost.median <= cost.high
        assert direct.median < call.median
        assert cost.median < call.median


def test_compiled_code_holds_nothing_of_the_choice() -> None:
    rows = measure(rounds=2, calls=2).rows
    assert of(rows, ADDED)["compiled"].note == "the graph is the same"
    assert of(rows, "one call, compiled").keys() == {DIRECT, "compiled"}


def test_measuring_leaves_backends_and_environment_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "naive")
    known = maxattn.list_backends()
    measure(rounds=2, calls=2)
    assert os.environ["MAXATTN_BACKEND"] == "naive"
    assert maxattn.list_backends() == known
    assert maxattn.explain(torch.randn(1, 4, 4, 3, 1, 4), window=2).backend == "naive"
