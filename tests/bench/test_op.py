"""`maxattn bench op`: who can is timed, who cannot says why, who is wrong is not timed; and the floor is arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from maxattn.bench import Result, Row
from maxattn.bench.op import Shape, measure, shapes
from maxattn.bench.timing import Effort
from maxattn.ops.contract import Capabilities, Problem
from maxattn.ops.naive import Naive
from maxattn.ops.registry import registered
from maxattn.testing.case import Case
from maxattn.testing.observe import verify

SMALL = Shape(2, (5, 6), 64, (2, 3))


class Wrong(Naive):
    name = "wrong"

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().attend(qkv, bias, problem) * 1.001


class ForwardOnly(Naive):
    name = "forward_only"
    capabilities = Capabilities(backward=False)


class Noting(Naive):
    """Notes which bias it is given, which one the problem tells, and of what it is to give the gradient."""

    name = "noting"

    def __init__(self) -> None:
        self.seen: set[tuple[torch.dtype | None, torch.dtype | None, bool, bool]] = set()

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        given = None if bias is None else bias.dtype
        self.seen.add((given, problem.bias, problem.requires_grad, problem.bias_requires_grad))
        return super().attend(qkv, bias, problem)


def within_budget(attend: Any, problem: Problem) -> None:
    verify(attend, Case(problem=problem))


measured = partial(measure, [SMALL], within_budget, effort=Effort(least=2, most=2, sample=0))


def by_pass(result: Result, candidate: str) -> dict[Any, Row]:
    return {row.case["pass"]: row for row in result.rows if row.candidate == candidate}


def test_every_backend_is_timed_in_both_passes_and_axes() -> None:
    result = measured(backends=["naive", "sdpa"])
    assert {(row.case["axis"], row.case["pass"]) for row in result.rows} == {
        (axis, what) for axis in ("block", "grid") for what in ("forward", "training")
    }
    for name in ("naive", "sdpa"):
        rows = [row for row in result.rows if row.candidate == name]
        assert len(rows) == 4
        assert all(row.time is not None and row.time.median > 0 and row.note == "" for row in rows)
    forward, training = (by_pass(result, "naive")[what] for what in ("forward", "training"))
    assert forward.case["size"] == "5x6"
    assert forward.mib is not None
    assert training.mib is not None
    assert 0 < forward.mib < training.mib


@pytest.mark.parametrize(("bias", "told", "dtype"), [(True, "float32", torch.float32), (False, "none", None)])
def test_a_call_has_the_bias_that_its_case_tells_or_none(bias: bool, told: str, dtype: torch.dtype | None) -> None:
    with registered(Noting()) as backend:
        result = measured(axes=["block"], backends=["noting"], biases=[bias], dtype=torch.bfloat16)
    assert {row.case["bias"] for row in result.rows} == {told}
    assert {(row.case["pass"], row.note) for row in result.rows} == {("forward", ""), ("training", "")}
    assert backend.seen == {(dtype, dtype, False, False), (dtype, dtype, True, bias)}


def test_cases_with_a_bias_and_without_are_apart() -> None:
    result = measured(axes=["block"], passes=["forward"], backends=["naive"], biases=[True, False])
    assert [(row.case["bias"], row.candidate) for row in result.rows] == [
        (bias, candidate) for bias in ("float32", "none") for candidate in ("floor", "copy", "naive")
    ]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_floor_moves_each_element_once_at_the_bandwidth_of_a_copy(dtype: torch.dtype, size: int) -> None:
    result = measured(axes=["block"], backends=["naive"], dtype=dtype)
    floors = by_pass(result, "floor")
    elements = 2 * 5 * 6 * 64
    bandwidth = result.settings["bytes_per_second"]
    assert isinstance(bandwidth, float)
    for what, moved in (("forward", 4), ("training", 12)):
        time = floors[what].time
        assert time is not None
        assert time.median == pytest.approx(moved * elements * size / bandwidth)
    assert "copy" in {row.candidate for row in result.rows}


def test_a_wrong_backend_is_not_timed() -> None:
    with registered(Wrong()):
        row = by_pass(measured(axes=["block"], passes=["forward"], backends=["wrong"]), "wrong")["forward"]
    assert row.time is None
    assert "over the error budget" in row.note


def test_a_backend_that_is_not_able_says_why_and_stops_no_other() -> None:
    with registered(ForwardOnly()):
        result = measured(axes=["block"], backends=["forward_only", "naive"])
    rows = by_pass(result, "forward_only")
    assert rows["forward"].time is not None
    assert (rows["training"].time, rows["training"].note) == (None, "not able: a backward pass is not supported")
    assert by_pass(result, "naive")["training"].time is not None


def test_an_unknown_backend_is_told_with_the_known() -> None:
    row = by_pass(measured(axes=["block"], passes=["forward"], backends=["sdpaa"]), "sdpaa")["forward"]
    assert "did you mean 'sdpa'?" in row.note


def test_a_compiled_backend_is_one_more() -> None:
    row = by_pass(measured(axes=["grid"], passes=["forward"], backends=["naive+compile"]), "naive+compile")["forward"]
    assert (row.library, row.mode, row.note) == ("naive", "compiled", "")
    assert row.time is not None


def test_all_backends_are_measured_by_default() -> None:
    with registered(ForwardOnly()):
        result = measured(axes=["block"], passes=["forward"])
    assert {"floor", "copy", "naive", "sdpa", "forward_only"} <= {row.candidate for row in result.rows}


def test_a_width_that_heads_do_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="width 20 is no multiple of 32"):
        measure([Shape(1, (4, 4), 20, (2, 2))], within_budget)


def test_larger_windows_come_with_fewer_images() -> None:
    assert len(shapes(8, more=False)) == 4
    assert {(shape.window[0], shape.batch) for shape in shapes(256, more=True)} == {
        (7, 256),
        (8, 128),
        (12, 64),
        (14, 64),
        (16, 64),
        (28, 32),
    }
    assert min(shape.batch for shape in shapes(1, more=True)) == 1
