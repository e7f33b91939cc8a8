"""The adapter on a CPU: compiled to code where it has no gradients, and with gradients traced and run as a graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import HOPPER, names_of_checks
from fresh_python import announce, python
from torch import Tensor
from torch.fx import GraphModule

import maxattn
from maxattn.ops.contract import Problem, Reason
from maxattn.ops.registry import registered
from maxattn.testing import check_backend
from maxattn_flex import Flex, backend, compiled

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # PyTorch's compiler looks

PROJECT = Path(__file__).parents[1]
ON_CPU = replace(HOPPER, device="cpu", compute_capability=None, requires_grad=False, bias_requires_grad=False)


class Inference(Flex):
    """Flex on a CPU, as it is."""

    name = "inference"
    capabilities = replace(Flex.capabilities, devices=frozenset({"cpu"}), backward=False)


class Training(Flex):
    """Flex with a backward pass on a CPU, which only code for a GPU has: for graphs that run as they were traced."""

    name = "training"
    capabilities = replace(Flex.capabilities, devices=frozenset({"cpu"}))
    trains_on = frozenset({"cpu"})


class TrainingWithoutBias(Training):
    """The gradient of a bias is lost where the backward pass is traced too but no code is generated."""

    name = "training_without_bias"
    capabilities = replace(Training.capabilities, bias_gradient=False)


GENERATED = ("forward", "ragged", "generated")
"""Checks that show that the compiler's code for a CPU is right: each of its problems takes seconds to compile."""

LEFT_OUT = frozenset(
    [
        *("heads", "values", "cancelling_sums", "many_windows", "windows", "far_apart"),  # minutes, or gigabytes
        *("independent_calls", "no_side_effects", "default_dtype", "compiled"),  # many calls that compile anew
        *("threads", "checkpointing", "generated", "operators"),  # FlexAttention that runs as it was traced cannot
    ]
)


@pytest.fixture(autouse=True)
def flex() -> Iterator[Flex]:
    compiled.compiled.cache_clear()
    with registered(Flex()) as flex:
        yield flex


@pytest.fixture
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch checks on a CPU that no gradient is asked for; what is traced has one all the same."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)


def reasons(problem: Problem) -> tuple[Reason, ...]:
    (answer,) = (one for one in maxattn.explain(problem).candidates if one.name == "flex")
    return answer.reasons


@pytest.mark.parametrize("name", GENERATED)
def test_conforms_where_code_is_generated(name: str) -> None:
    (outcome,) = check_backend(Inference(), examples=3, only=[name]).checks
    assert outcome.status == "passed", str(outcome)


@pytest.mark.usefixtures("gradients_on_cpu")
@pytest.mark.parametrize("name", names_of_checks(Training(), "cpu", LEFT_OUT))
def test_conforms_with_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    (outcome,) = check_backend(Training(), examples=5, only=[name]).checks
    assert outcome.status == "passed", str(outcome)


@pytest.mark.usefixtures("gradients_on_cpu")
@pytest.mark.parametrize("name", ["second_backward", "double_backward", "checkpointing"])
def test_conforms_where_the_backward_pass_is_traced_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    (outcome,) = check_backend(TrainingWithoutBias(), examples=5, only=[name]).checks
    assert outcome.status == "passed", str(outcome)


@pytest.mark.usefixtures("gradients_on_cpu")
def test_a_graph_may_be_kept_after_a_backward_pass_that_freed_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    with registered(TrainingWithoutBias()):
        for batch, retain in ((2, False), (3, True)):
            qkv = torch.randn(batch, 4, 4, 3, 1, 16, requires_grad=True)
            out = maxattn.max_sa(qkv, window=2, backend="training_without_bias")
            out.sum().backward(retain_graph=retain)
        first = qkv.grad
        qkv.grad = None
        out.sum().backward()
    torch.testing.assert_close(qkv.grad, first, rtol=0, atol=0)


class Calls:
    """Counts graphs that are compiled, and calls of what they are compiled to."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def generate(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(compiled, "generate_code", calls.generate)
    return calls


def attend(batch: int, size: int, window: int, heads: int, head_dim: int, **arguments: Any) -> None:
    qkv = torch.randn(batch, size, size, 3, heads, head_dim)
    out = maxattn.max_sa(qkv, window=window, backend="flex", **arguments)
    exact = maxattn.max_sa(qkv.double(), window=window, backend="naive", **arguments)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_long_run_over_many_problems_never_runs_uncompiled(calls: Calls) -> None:
    problems = [(window, heads, head_dim) for window in (2, 3, 4, 5) for heads in (1, 2) for head_dim in (16, 24, 32)]
    limit = torch._dynamo.config.recompile_limit
    assert len(problems) > 2 * limit
    for _ in range(2):
        for batch in (1, 2, 5):
            for window, heads, head_dim in problems:
                attend(batch, 2 * window, window, heads, head_dim)
    assert calls.calls == 2 * 3 * len(problems)
    assert calls.graphs == len(problems)


def test_images_of_any_size_are_served_by_a_few_graphs(calls: Calls) -> None:
    for size in range(8, 40):
        attend(2, size, 7, 1, 16, axis="grid")
        attend(2, size, 7, 1, 16, axis="block", bias=torch.randn(1, 49, 49))
    assert calls.calls > 100
    assert calls.graphs <= 2 * 3  # for each: full windows, windows cut off, and those of one token


def test_a_family_whose_limit_is_reached_starts_anew(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, threads = torch._dynamo.config.recompile_limit, torch.get_num_threads()
    try:
        for number in range(1, limit + 4):
            torch.set_num_threads(number)  # what is compiled holds for this number only
            attend(2, 4, 2, 1, 16)
    finally:
        torch.set_num_threads(threads)
    assert calls.calls == calls.graphs == limit + 3


def test_families_that_were_not_used_for_long_are_forgotten_and_compiled_again(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compiled", lru_cache(maxsize=2)(compiled.Compiled))
    for head_dim in (16, 24, 16, 24, 32, 16):
        attend(2, 4, 2, 1, head_dim)
    assert (calls.calls, calls.graphs) == (6, 4)


@pytest.mark.parametrize(
    ("changed", "codes"),
    [
        pytest.param({"compute_capability": (7, 5)}, {"too_old"}, id="GPU too old"),
        pytest.param({"compute_capability": None}, {"compute_capability"}, id="ROCm"),
        pytest.param({"device": "mps", "compute_capability": None}, {"device"}, id="mps"),
        pytest.param({"dtype": torch.float64}, {"dtype"}, id="fp64"),
        pytest.param({"head_dim": 8}, {"head_dim"}, id="head dim too small"),
        pytest.param({"head_dim": 264}, {"head_dim"}, id="head dim too large"),
        pytest.param({"head_dim": 129, "dtype": torch.float32}, {"head_dim"}, id="head dim too large for fp32"),
        pytest.param({"head_dim": 128, "dtype": torch.float32}, set(), id="head dim as large as fp32 takes"),
        pytest.param({"dropout_p": 0.1}, {"dropout"}, id="dropout"),
        pytest.param({"deterministic": True}, {"deterministic"}, id="determinism of the gradient of the bias"),
        pytest.param({"compiling": True}, {"compile"}, id="compiling, with the gradient of the bias"),
        pytest.param({"compiling": True, "exporting": True}, {"export"}, id="exporting"),
        pytest.param({}, set(), id="able"),
        pytest.param({"compute_capability": (12, 1)}, set(), id="able, on a new GPU"),
        pytest.param({"height": 15, "bias": torch.float64, "head_dim": 50}, set(), id="able, at any size"),
        pytest.param({"compiling": True, "bias_requires_grad": False}, set(), id="able, compiling"),
        pytest.param({"deterministic": True, "bias_requires_grad": False}, set(), id="able, deterministic"),
    ],
)
def test_what_it_cannot_serve_on_a_gpu_it_declines_with_a_reason(
    changed: dict[str, Any], codes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    assert {reason.code for reason in reasons(replace(HOPPER, **changed))} == codes


def test_on_a_gpu_it_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert reasons(HOPPER) == (Reason("not_installed", "triton is not installed", "pip install triton"),)


def test_on_a_cpu_it_declines_gradients() -> None:
    assert reasons(ON_CPU) == ()
    for gradient in ("requires_grad", "bias_requires_grad"):
        (reason,) = reasons(replace(ON_CPU, **{gradient: True}))
        assert str(reason) == "FlexAttention has no backward pass on cpu (no gradient, or cuda)"


def test_on_a_cpu_it_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (reason,) = reasons(ON_CPU)
    assert reason.code == "not_installed"
    assert reason.message == "PyTorch compiles for a CPU by no-such-compiler, which is not installed"


@pytest.mark.parametrize(("platform", "capability"), [("linux", "DEFAULT"), ("darwin", "AVX2")])
def test_on_a_cpu_that_pytorch_has_no_code_for_it_says_so(
    platform: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.sys, "platform", platform)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    (reason,) = reasons(ON_CPU)
    assert reason.code == "device"


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        pytest.param({"device": "cpu", "compute_capability": None}, False, id="cpu"),
        pytest.param({"bias": None}, True, id="49 tokens, no bias"),
        pytest.param({"bias": None, "window": (12, 12)}, False, id="144 tokens, no bias"),
        pytest.param({"bias": None, "requires_grad": True}, True, id="49 tokens, no bias, training"),
        pytest.param({"dtype": torch.float32}, False, id="fp32"),
        pytest.param({"window": (28, 28)}, False, id="784 tokens"),
        pytest.param({}, True, id="49 tokens"),
        pytest.param({"requires_grad": True}, False, id="49 tokens, training"),
        pytest.param({"requires_grad": True, "window": (12, 12)}, True, id="144 tokens, training"),
    ],
)
def test_it_is_chosen_before_sdpa_where_it_was_measured_to_be_faster(changes: dict[str, Any], before: bool) -> None:
    problem = replace(HOPPER, **{"requires_grad": False, "bias_requires_grad": False, **changes})
    assert (Flex().relative_speed(problem) > 1) == before


def test_the_library_is_imported_at_first_use() -> None:
    program = """
import sys
from maxattn.ops.contract import Problem
from maxattn_flex import Flex

problem = Problem(axis="block", window=(7, 7), batch=1, height=14, width=14, heads=2, head_dim=32)
assert not Flex().unsupported(problem)
print([name for name in ("torch.nn.attention.flex_attention", "torch._dynamo", "triton") if name in sys.modules])
"""
    assert python(arguments=("-c", program)) == "[]\n"


def test_an_installed_plugin_is_found_and_answers(tmp_path: Path) -> None:
    announce(PROJECT, tmp_path)
    asked = ("--device", "cuda", "--compute-capability", "7.5", "--dtype", "bf16", "--json")
    answer = json.loads(python(PROJECT / "src", tmp_path, arguments=("-m", "maxattn", "explain", *asked)))
    assert answer["backend"] == "sdpa"
    (told,) = (one for one in answer["candidates"] if one["name"] == "flex")
    assert [reason["code"] for reason in told["reasons"]] == ["too_old"]


if torch.cuda.is_available():

    @pytest.mark.parametrize("name", names_of_checks(Flex(), "cuda"))
    def test_conforms_on_a_gpu(name: str) -> None:
        (outcome,) = check_backend(Flex(), device="cuda", examples=20, only=[name]).checks
        assert outcome.status != "failed", str(outcome)
