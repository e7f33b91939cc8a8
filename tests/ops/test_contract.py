"""`Problem` states what a choice depends on; each field of `Capabilities` excludes what it says and nothing else."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import maxattn
from maxattn import Backend, Capabilities, Problem, Reason
from maxattn.ops.contract import MeasuredSpeed
from maxattn.ops.registry import registered

PROBLEM = Problem(axis="block", window=(4, 3), batch=2, height=8, width=9, heads=2, head_dim=24)
AMPERE_TO_HOPPER = {"compute_capability": ((8, 0), (9, 0))}
SINCE_AMPERE = {"compute_capability": ((8, 0), None)}
SINGLE = frozenset({torch.float32})

# What a backend states, a change of PROBLEM that this alone excludes, and the code of the reason.
EXCLUDED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"devices": frozenset({"cuda"})}, {"device": "cpu"}, "device"),
    (AMPERE_TO_HOPPER, {"device": "cuda", "compute_capability": (7, 5)}, "too_old"),
    (AMPERE_TO_HOPPER, {"device": "cuda", "compute_capability": (9, 1)}, "too_new"),
    (AMPERE_TO_HOPPER, {"device": "cuda", "compute_capability": None}, "compute_capability"),
    ({"dtypes": SINGLE}, {"dtype": torch.float16}, "dtype"),
    ({"head_dims": (16, 32)}, {"head_dim": 15}, "head_dim"),
    ({"head_dims": (16, 32)}, {"head_dim": 33}, "head_dim"),
    ({"head_dim_multiple": 8}, {"head_dim": 20}, "head_dim"),
    ({"window_tokens": (4, 12)}, {"window": (1, 3)}, "window"),
    ({"window_tokens": (4, 12)}, {"window": (13, 1), "height": 13}, "window"),
    ({"bias": False}, {"bias": torch.float32}, "bias"),
    ({"bias_dtypes": SINGLE}, {"bias": torch.bfloat16}, "bias_dtype"),
    ({"bias_gradient": False}, {"bias": torch.float32, "bias_requires_grad": True}, "bias_gradient"),
    ({"backward": False}, {"requires_grad": True}, "backward"),
    ({"backward": False}, {"bias": torch.float32, "bias_requires_grad": True}, "backward"),
    ({"dropout": False}, {"dropout_p": 0.1}, "dropout"),
    ({"deterministic": False}, {"deterministic": True}, "deterministic"),
    ({"ragged": False}, {"height": 9}, "ragged"),
    ({"ragged": False}, {"width": 8}, "ragged"),
    ({"ragged": False}, {"height": None}, "ragged"),
    ({"compile": False}, {"compiling": True}, "compile"),
    ({"export": False}, {"compiling": True, "exporting": True}, "export"),
]

# What a backend states, and a change of PROBLEM near its limit that it does not exclude.
ALLOWED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"devices": frozenset({"cuda", "cpu"})}, {"device": "cuda", "compute_capability": (9, 0)}),
    (AMPERE_TO_HOPPER, {"device": "cuda", "compute_capability": (8, 0)}),
    (AMPERE_TO_HOPPER, {"device": "cuda", "compute_capability": (9, 0)}),
    (AMPERE_TO_HOPPER, {"device": "cpu"}),
    (SINCE_AMPERE, {"device": "cuda", "compute_capability": (12, 0)}),
    ({"dtypes": SINGLE}, {"dtype": torch.float32}),
    ({"head_dims": (16, 32)}, {"head_dim": 16}),
    ({"head_dims": (16, 32)}, {"head_dim": 32}),
    ({"head_dim_multiple": 8}, {"head_dim": 8}),
    ({"window_tokens": (4, 12)}, {"window": (2, 2), "width": 8}),
    ({"window_tokens": (4, 12)}, {"window": (4, 3)}),
    ({"bias": False}, {"bias": None}),
    ({"bias_dtypes": SINGLE}, {"bias": torch.float32, "dtype": torch.bfloat16}),
    ({"bias_dtypes": SINGLE}, {"bias": None}),
    ({"bias_gradient": False}, {"bias": torch.float32, "requires_grad": True}),
    ({"backward": False}, {"bias": torch.float32}),
    ({"dropout": False}, {"dropout_p": 0.0}),
    ({"deterministic": False}, {"deterministic": False}),
    ({"ragged": False}, {"height": 4, "width": 3, "batch": None}),
    ({"compile": False}, {"compiling": True, "exporting": True}),
    ({"export": False}, {"compiling": True}),
    ({"double_backward": False}, {"requires_grad": True}),
]


class Stating(Backend):
    name = "stating"

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        raise AssertionError("only asked, never called")


def codes(problem: Problem) -> list[str]:
    """What `explain` says of the backend "stating"."""
    (candidate,) = [each for each in maxattn.explain(problem).candidates if each.name == "stating"]
    assert candidate.able == (not candidate.reasons)
    return [reason.code for reason in candidate.reasons]


@pytest.mark.parametrize(("stated", "change", "code"), EXCLUDED)
def test_a_stated_fact_alone_excludes_a_problem(stated: dict[str, Any], change: dict[str, Any], code: str) -> None:
    problem = replace(PROBLEM, **change)
    with registered(Stating(Capabilities(**stated))):
        assert codes(problem) == [code]
    with registered(Stating(Capabilities())):
        assert codes(problem) == []


@pytest.mark.parametrize(("stated", "change"), ALLOWED)
def test_a_stated_fact_excludes_no_more_than_it_says(stated: dict[str, Any], change: dict[str, Any]) -> None:
    with registered(Stating(Capabilities(**stated))):
        assert codes(replace(PROBLEM, **change)) == []


def test_every_fact_is_tested_both_ways() -> None:
    every = {field.name for field in fields(Capabilities)}
    assert {name for stated, _ in ALLOWED for name in stated} == every
    # Nobody knows of a second backward pass before the first, so this fact excludes nothing.
    assert {name for stated, _, _ in EXCLUDED for name in stated} == every - {"double_backward"}


def test_every_reason_is_given_and_not_only_the_first() -> None:
    capabilities = Capabilities(dtypes=SINGLE, head_dim_multiple=5, ragged=False, dropout=False)
    problem = replace(PROBLEM, dtype=torch.float16, height=7, dropout_p=0.5)
    reasons = capabilities.unsupported(problem)
    assert [reason.code for reason in reasons] == ["dtype", "head_dim", "ragged", "dropout"]


def test_reasons_say_what_was_seen_and_what_would_work() -> None:
    problem = replace(PROBLEM, device="cuda", compute_capability=(12, 0), dtype=torch.float64, head_dim=40, height=7)
    capabilities = Capabilities(
        **AMPERE_TO_HOPPER, dtypes=frozenset({torch.float16, torch.bfloat16}), head_dims=(16, 32), ragged=False
    )
    assert [str(reason) for reason in capabilities.unsupported(problem)] == [
        "compute capability 12.0 is too new (up to 9.0)",
        "no support for torch.float64 (dtypes: bfloat16, float16)",
        "head_dim 40 is out of range (from 16 to 32)",
        "windows that the image does not fill are not supported (height and width that are multiples of 4 and 3)",
    ]


def test_a_reason_without_a_hint_is_its_sentence() -> None:
    assert str(Reason("dropout", "no dropout")) == "no dropout"


@pytest.mark.parametrize(
    ("change", "ragged"),
    [({}, False), ({"height": 9}, True), ({"width": 10}, True), ({"height": 3}, True), ({"width": None}, True)],
)
def test_a_problem_is_ragged_where_a_window_is_not_full_or_might_not_be(change: dict[str, Any], ragged: bool) -> None:
    assert replace(PROBLEM, **change).ragged == ragged


def test_a_problem_knows_what_follows_from_its_facts() -> None:
    assert PROBLEM.tokens == 12
    assert PROBLEM.softmax_scale == 24**-0.5
    assert replace(PROBLEM, scale=0.0).softmax_scale == 0.0
    assert not PROBLEM.differentiated
    assert replace(PROBLEM, requires_grad=True).differentiated
    assert replace(PROBLEM, bias_requires_grad=True).differentiated


def test_a_problem_is_a_frozen_key() -> None:
    assert {PROBLEM: 1}[replace(PROBLEM)] == 1
    assert replace(PROBLEM, scale=0.5) != PROBLEM
    with pytest.raises(FrozenInstanceError):
        PROBLEM.heads = 3  # type: ignore[misc]


def test_a_problem_prints_its_facts() -> None:
    assert str(PROBLEM) == "block 4x3, image 2x8x9, 2 heads of 24, float32, cpu, no bias, no gradient"
    everything = replace(
        PROBLEM,
        batch=None,
        height=10,
        dtype=torch.bfloat16,
        device="cuda",
        compute_capability=(9, 0),
        bias=torch.float32,
        requires_grad=True,
        bias_requires_grad=True,
        dropout_p=0.1,
        deterministic=True,
        compiling=True,
        exporting=True,
    )
    assert str(everything) == (
        "block 4x3, image ?x10x9, 2 heads of 24, bfloat16, cuda sm90, bias float32, gradient of qkv and bias, "
        "dropout 0.1, ragged, deterministic, compiling, exporting"
    )


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"head_dims": (64, 16)}, ValueError, r"head_dims .* 1 <= low <= high, not \(64, 16\)"),
        ({"head_dims": (17, 23), "head_dim_multiple": 8}, ValueError, "with a multiple of 8 between them"),
        ({"window_tokens": (0, 4)}, ValueError, r"window_tokens .* not \(0, 4\)"),
        ({"window_tokens": 64}, TypeError, r"window_tokens .* two integers, not 64"),
        ({"head_dim_multiple": 0}, ValueError, "must be 1 or more, not 0"),
        ({"dtypes": frozenset()}, ValueError, "dtypes of Capabilities is empty"),
        ({"dtypes": None}, TypeError, "dtypes of Capabilities must be a frozenset, not None"),
        ({"devices": {"cpu"}}, TypeError, "devices of Capabilities must be a frozenset, not {'cpu'}"),
    ],
)
def test_facts_that_exclude_everything_are_refused(facts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Capabilities(**facts)


def measured(**tables: Any) -> MeasuredSpeed:
    usual = ((49, 3.0), (64, 2.0))
    names = ("inference", "training", "inference_without_bias", "training_without_bias")
    return MeasuredSpeed(**{name: tables.get(name, usual) for name in names})


def test_a_measured_speed_is_by_tokens_pass_and_bias() -> None:
    problem = Problem(axis="block", window=(7, 7), batch=1, height=7, width=7, heads=1, head_dim=16)
    with_bias, wider = replace(problem, bias=torch.float32), replace(problem, window=(7, 8))
    training = replace(problem, requires_grad=True)
    speed = measured(inference=((64, 5.0),), training_without_bias=((64, 7.0),))
    assert [speed.of(each) for each in (problem, wider, with_bias, training)] == [3.0, 2.0, 5.0, 7.0]
    assert speed.of(replace(problem, window=(9, 9))) == 2.0  # of more tokens than were measured: that of the most


@pytest.mark.parametrize("table", [(), ((64, 2.0), (49, 3.0)), ((49, 2.0), (49, 3.0))])
def test_a_table_of_speeds_that_does_not_ascend_is_refused(table: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"training of MeasuredSpeed must be of ascending .*, not of \["):
        measured(training=table)
