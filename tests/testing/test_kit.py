"""The conformance kit reports what it found so that anybody can act on it, and says clearly what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import maxattn
from maxattn import Capabilities, Problem
from maxattn.ops.naive import Naive
from maxattn.ops.registry import backends
from maxattn.testing import Report, check_backend, parametrize_with_backend_checks, strategies
from maxattn.testing.registry import CHECKS

NARROW = Capabilities(dtypes=frozenset({torch.float32}), bias=False, dropout=False, compile=False, export=False)


class OffFromSeven(Naive):
    """Wrong from seven rows on, which a smallest case has to show."""

    name = "off_from_seven"
    capabilities = NARROW

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        out = super().attend(qkv, bias, problem)
        return out * 1.01 if qkv.shape[1] >= 7 else out


@pytest.fixture(scope="module")
def report() -> Report:
    return check_backend(OffFromSeven(), examples=60, only=["interface", "ragged", "bias_dtypes", "empty_batch"])


def test_a_report_holds_every_check_with_its_verdict(report: Report) -> None:
    verdicts = {outcome.name: outcome.status for outcome in report.checks}
    assert verdicts == {
        "interface": "passed",
        "ragged": "failed",
        "bias_dtypes": "not applicable",
        "empty_batch": "passed",
    }
    assert not report.passed
    assert [outcome.name for outcome in report.failed] == ["ragged"]
    assert all(outcome.promise for outcome in report.checks)
    assert report.checks[2].reason == "not declared: bias"


def test_a_failure_comes_with_the_smallest_problem(report: Report) -> None:
    (failed,) = report.failed
    assert failed.problem is not None
    assert (failed.problem.batch, failed.problem.height, failed.problem.heads) == (1, 7, 1)
    assert failed.problem.head_dim == 1
    assert "over the error budget: out (max): error" in failed.failure


def test_the_same_seed_finds_the_same_case_again(report: Report) -> None:
    again = check_backend(OffFromSeven(), examples=60, only=["ragged"])
    assert again.failed[0].case == report.failed[0].case
    other = check_backend(OffFromSeven(), examples=60, only=["ragged"], seed=5)
    assert other.failed[0].seed == 5


def test_the_text_tells_what_failed_what_was_promised_and_for_what(report: Report) -> None:
    text = str(report)
    assert "FAILED: over the error budget" in text
    assert "promised: images that the window does not divide" in text
    assert f"smallest case found: {report.failed[0].case}" in text
    assert "off_from_seven on cpu: FAILS 1 of 4 checks, " in text.splitlines()[-1]


def test_one_cause_is_told_once() -> None:
    class Crashing(Naive):
        name = "crashing"

        def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
            raise SystemExit("I leave")

    text = str(check_backend(Crashing(), examples=3, only=["forward", "scale", "heads"]))
    assert text.count("it raises SystemExit: I leave") == 1
    assert text.count("FAILED: as forward does") == 2


def test_a_case_can_be_computed_again_by_hand(report: Report) -> None:
    case = report.failed[0].case
    assert case is not None
    qkv, bias, _ = case.tensors()
    assert bias is None
    problem = case.problem
    wrong = OffFromSeven().attend(qkv, bias, problem)
    right = maxattn.max_sa(qkv, problem.axis, problem.window, scale=problem.scale, backend="naive")
    torch.testing.assert_close(wrong, right * 1.01)


def test_fail_fast_stops_at_the_first_failure() -> None:
    report = check_backend(OffFromSeven(), examples=20, fail_fast=True)
    assert [outcome.status for outcome in report.checks].count("failed") == 1
    assert report.checks[-1].status == "failed"


def test_no_examples_means_not_passed() -> None:
    assert not check_backend(OffFromSeven(), only=["bias_dtypes"]).passed


def test_the_backend_is_registered_only_while_it_is_checked() -> None:
    before = dict(backends())
    check_backend(OffFromSeven(), only=["interface"])
    assert dict(backends()) == before


def test_modes_of_the_process_are_as_before() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    try:
        state = torch.get_rng_state()
        assert check_backend("naive", examples=2, only=["bitwise", "dropout_gradient", "threads"]).passed
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


class Nameless(Naive):
    name = None  # type: ignore[assignment]


class Factless(Naive):
    name = "factless"
    capabilities = {"bias": True}  # type: ignore[assignment]  # noqa: RUF012


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "sdpaa"}, ValueError, "no backend is named 'sdpaa'; did you mean 'sdpa'"),
        ({"backend": Naive}, TypeError, r"must be an instance: Naive\(\), not the class"),
        ({"backend": 3}, TypeError, "a backend must be an instance of maxattn.Backend, not 3"),
        ({"backend": Nameless()}, ValueError, "a backend's name must be an identifier, not None"),
        ({"backend": Factless()}, TypeError, "capabilities must be maxattn.Capabilities, not {'bias': True}"),
        ({"only": ["raged"]}, ValueError, "no check is named 'raged'; did you mean ragged"),
        ({"examples": 0}, ValueError, "examples must be at least 1, not 0"),
        ({"examples": 2.5}, TypeError, "examples must be an integer, not 2.5"),
        ({"seed": 2**70}, ValueError, "seed must be from 0"),
        ({"device": "meta"}, ValueError, "device 'meta' is no kind of device"),
        ({"dtypes": ["fp32"]}, TypeError, "dtypes such as torch.float32, not of 'fp32'"),
        ({"seed": "0"}, TypeError, "seed must be an integer, not '0'"),
        ({"device": None}, ValueError, "device None is no kind of device"),
        ({"dtypes": torch.float32}, TypeError, r"dtypes must be a list: \[torch.float32\]"),
        ({"device": "abacus"}, ValueError, "device 'abacus'"),
        ({"device": "mps"}, ValueError, "device 'mps': there is none here"),
        ({"backend": OffFromSeven(), "dtypes": [torch.float16]}, ValueError, "does not declare torch.float16"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_backend(**{"backend": "naive", "only": ["interface"]} | arguments)


def test_only_the_dtypes_asked_for_are_drawn() -> None:
    seen = set()

    class Listening(Naive):
        name = "listening"

        def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
            seen.add(qkv.dtype)
            return super().attend(qkv, bias, problem)

    assert check_backend(Listening(), examples=10, only=["forward", "values"], dtypes=[torch.bfloat16]).passed
    assert seen == {torch.bfloat16}


def test_every_check_is_documented_in_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "conformance.md").read_text(encoding="utf-8")
    for check in CHECKS.values():
        assert f"| `{check.name}` | {check.promise} |" in guide


TESTS = """
from maxattn import Capabilities
from maxattn.ops.naive import Naive
from maxattn.testing import parametrize_with_backend_checks

class Mine(Naive):
    name = "mine"
    capabilities = Capabilities(dropout=False, compile=False, export=False)

    def attend(self, qkv, bias, problem):
        out = super().attend(qkv, bias, problem)
        return out * 1.5 if problem.scale else out

@parametrize_with_backend_checks(Mine(), expected_failures={expected}, examples=3)
def test_conformance(check):
    check()
"""


def run_tests(folder: Path, expected: dict[str, str]) -> str:
    (folder / "test_mine.py").write_text(TESTS.replace("{expected}", repr(expected)), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "scale or empty", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder).stdout


def test_a_failed_check_fails_the_test_with_the_report(tmp_path: Path) -> None:
    told = run_tests(tmp_path, {})
    assert "1 failed, 1 passed" in told
    assert "any scale: 0, negative, not the default" in told
    assert "smallest case found" in told


def test_an_expected_failure_is_no_failure(tmp_path: Path) -> None:
    told = run_tests(tmp_path, {"scale": "scales the output too"})
    assert "1 passed" in told
    assert "1 xfailed" in told


def test_an_expected_failure_that_passes_fails(tmp_path: Path) -> None:
    told = run_tests(tmp_path, {"scale": "scales the output too", "empty_batch": "no reason at all"})
    assert "1 failed" in told
    assert "[XPASS(strict)] no reason at all" in told


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"bias_dtypes": "why not"}, "'bias_dtypes' is expected, which does not apply to off_from_seven: not declared"),
        ({"raged": "why not"}, "no check is named 'raged'"),
    ],
)
def test_a_failure_cannot_be_expected_of_what_is_not_run(expected: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parametrize_with_backend_checks(OffFromSeven(), expected)


def maxattn_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maxattn", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_passes_a_right_backend_and_tells_in_json() -> None:
    told = maxattn_check("naive", "--examples", "5", "--only", "ragged", "--only", "forward", "--json")
    assert told.returncode == 0, told.stderr
    facts = json.loads(told.stdout)
    assert (facts["backend"], facts["device"], facts["passed"]) == ("naive", "cpu", True)
    assert [(one["name"], one["status"]) for one in facts["checks"]] == [("forward", "passed"), ("ragged", "passed")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sdpaa",), "no backend is named 'sdpaa'; did you mean 'sdpa'?"),
        (("sdpa", "--only", "raged"), "no check is named 'raged'; did you mean ragged?"),
        (("sdpa", "--device", "abacus"), "device 'abacus'"),
        (("sdpa", "--dtype", "fp12"), "'fp12' is no dtype"),
    ],
)
def test_the_command_tells_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    told = maxattn_check(*arguments)
    assert told.returncode == 2
    assert message in told.stderr


@pytest.mark.parametrize("missing", ["hypothesis", "pytest"])
def test_what_is_not_installed_is_told_and_nothing_else_needs_it(missing: str) -> None:
    name = {"hypothesis": "check_backend", "pytest": "parametrize_with_backend_checks"}[missing]
    program = f"""
import sys
sys.modules[{missing!r}] = None
import maxattn.testing, maxattn.cli.self_check
try:
    from maxattn.testing import {name}
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == f"{name} needs {missing}, which is not installed: pip install 'maxattn[testing]'\n", run.stderr


def test_the_command_tells_that_hypothesis_is_missing() -> None:
    program = """
import sys
sys.modules["hypothesis"] = None
sys.argv[1:] = ["check", "naive"]
import maxattn.cli
maxattn.cli.main()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "check_backend needs hypothesis, which is not installed: pip install 'maxattn[testing]'" in run.stderr


@pytest.mark.parametrize(
    ("expected", "error", "message"),
    [
        (["scale"], TypeError, r"must map names of checks to reasons, not be \['scale'\]"),
        ({"scale": " "}, ValueError, "the failure of 'scale' is expected, but not why: ' ' is no reason"),
    ],
)
def test_an_expected_failure_needs_a_reason(expected: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parametrize_with_backend_checks("naive", expected)


def test_windows_of_more_tokens_than_the_kit_tries_by_default_are_tried_where_no_other_is_declared() -> None:
    assert strategies.windows(Capabilities(window_tokens=(2000, 2100)))


def test_the_case_that_is_shown_has_nothing_in_it_that_the_failure_does_not_need() -> None:
    class Doubled(Naive):
        name = "doubled"

        def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
            return super().attend(qkv, bias, problem) * (2 if problem.scale else 1)

    (outcome,) = check_backend(Doubled(), examples=3, only=["scale"]).checks
    assert outcome.case is not None
    problem = outcome.case.problem
    assert (problem.bias, problem.requires_grad, problem.batch, problem.heads) == (None, False, 1, 1)
    assert problem.scale
