"""What `maxattn bench` measures."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime

import pytest
import torch
from typer.testing import CliRunner

import maxattn
from maxattn.bench import GOAL_US, dispatch_cost, machine
from maxattn.cli import app


def test_the_cost_of_a_choice_is_what_a_call_takes_beyond_its_backend() -> None:
    result = dispatch_cost(rounds=20, calls=50)
    assert [cost.asked_by for cost in result.costs] == [
        "automatic",
        "backend argument",
        "use_backend",
        "MAXATTN_BACKEND",
    ]
    for cost in result.costs:
        assert 0 < cost.low <= cost.added <= cost.high
        assert result.direct < cost.call
        assert cost.added < cost.call


def test_measuring_leaves_backends_and_environment_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "naive")
    known = maxattn.list_backends()
    dispatch_cost(rounds=2, calls=2)
    assert os.environ["MAXATTN_BACKEND"] == "naive"
    assert maxattn.list_backends() == known
    assert maxattn.explain(torch.randn(1, 4, 4, 3, 1, 4), window=2).backend == "naive"


def test_the_stamp_tells_the_machine_and_the_time() -> None:
    stamp = machine()
    assert stamp.cpu
    assert 1 <= stamp.cores <= (os.cpu_count() or 1)
    assert (stamp.python, stamp.torch, stamp.maxattn) == (
        platform.python_version(),
        torch.__version__,
        maxattn.__version__,
    )
    assert datetime.fromisoformat(stamp.date).tzinfo is not None


def test_the_command_prints_the_measurement_as_text_and_as_json() -> None:
    text, plain = (CliRunner().invoke(app, ["bench", "dispatch", *options]) for options in ((), ("--json",)))
    assert (text.exit_code, plain.exit_code) == (0, 0)
    for told in (machine().cpu, "MAXATTN_BACKEND", "added", f"goal {GOAL_US:g}"):
        assert told in text.stdout
    result = json.loads(plain.stdout)
    assert result["goal"] == GOAL_US == 5.0
    assert result["machine"]["torch"] == torch.__version__
    assert {cost["asked_by"] for cost in result["costs"]} > {"automatic", "use_backend"}
