"""`maxattn doctor` tells what is there, and finds what is broken."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import maxattn

Run = Callable[..., Result]

REPOSITORY = Path(__file__).parents[2]

PLUGINS = """
import maxattn
from maxattn.hookspecs import hookimpl
from maxattn.ops.naive import Naive


class Wrong(Naive):
    name = "wrong"

    def attend(self, qkv, bias, problem):
        return super().attend(qkv, bias, problem) * (1.001 if problem.axis == "grid" else 1)


class WrongGradient(Naive):
    name = "wrong_gradient"

    def attend(self, qkv, bias, problem):
        out = super().attend(qkv, bias, problem)
        return out + 0.01 * (qkv[:, :, :, 2] - qkv[:, :, :, 2].detach())


class NotANumber(Naive):
    name = "not_a_number"

    def attend(self, qkv, bias, problem):
        return super().attend(qkv, bias, problem) * float("nan")


class WrongShape(Naive):
    name = "wrong_shape"

    def attend(self, qkv, bias, problem):
        return super().attend(qkv, bias, problem).flatten(-2)


class Crashing(Naive):
    name = "crashing"

    def attend(self, qkv, bias, problem):
        raise RuntimeError("the kernel is gone")


class Undecided(Naive):
    name = "undecided"

    def unsupported(self, problem):
        raise KeyError("no idea")


class Elsewhere(Naive):
    name = "elsewhere"
    capabilities = maxattn.Capabilities(devices=frozenset({"abacus"}))


class Plain(Naive):
    name = "plain"
    capabilities = maxattn.Capabilities(bias=False, backward=False, ragged=False)


@hookimpl
def maxattn_backends():
    return [Wrong(), WrongGradient(), NotANumber(), WrongShape(), Crashing(), Undecided(), Elsewhere(), Plain()]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two installed distributions: one whose plugin gives faulty backends, one whose plugin cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    for name, code in (("faulty", PLUGINS), ("absent", "import a_library_that_is_not_there")):
        (folder / f"maxattn_{name}.py").write_text(code, encoding="utf-8")
        info = folder / f"maxattn_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: maxattn-{name}\nVersion: 1.2\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[maxattn]\n{name} = maxattn_{name}\n", encoding="utf-8")
    return folder


def doctor(installed: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("MAXATTN_")}
    path = os.pathsep.join([str(REPOSITORY), str(installed), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "maxattn", "doctor", *arguments],
        env={**others, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def faults(installed: Path) -> dict[str, Any]:
    finished = doctor(installed, "--json")
    assert finished.returncode == 1, finished.stderr
    return json.loads(finished.stdout)


def checks(facts: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    return [check for check in facts["checks"] if check["backend"] == backend and check["device"] == "cpu"]


def test_a_sound_installation_is_told_in_full_and_exits_with_0(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "sdpa")
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["problems"] == []
    assert facts["environment"]["MAXATTN_BACKEND"] == "sdpa"
    seen = [facts["versions"][name] for name in ("maxattn", "python", "torch", "cuda")]
    assert seen == [maxattn.__version__, platform.python_version(), torch.__version__, torch.version.cuda]
    assert facts["devices"][0]["device"] == "cpu"
    core = facts["plugins"][0]
    assert (core["name"], core["distribution"], core["backends"]) == ("core", "maxattn", ["naive", "sdpa"])
    for backend in ("naive", "sdpa"):
        problems = {check["problem"] for check in checks(facts, backend) if check["status"] == "ok"}
        assert problems == {
            f"{axis}, {size}, {dtype}"
            for axis in ("block", "grid")
            for size in ("full", "ragged")
            for dtype in ("float32", "bfloat16")
        }


def test_the_text_names_what_the_json_holds(run: Run) -> None:
    told = run("doctor").stdout
    for fact in (torch.__version__, platform.python_version(), "MAXATTN_PLUGINS", "naive, sdpa", "Everything works."):
        assert fact in told


def test_a_variable_that_names_nothing_installed_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "sdpaa")
    monkeypatch.setenv("MAXATTN_PLUGINS", "nowhere")
    facts = json.loads(run("doctor", "--json", exit_code=1).stdout)
    assert len(facts["problems"]) == 2
    assert facts["problems"][0].startswith("MAXATTN_BACKEND names 'sdpaa', but no such backend is installed")
    assert facts["problems"][1].startswith("MAXATTN_PLUGINS names 'nowhere', but no such plugin is installed")


def test_a_list_of_backends_may_hold_some_that_are_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "triton, sdpa")
    assert json.loads(run("doctor", "--json").stdout)["problems"] == []


def test_a_plugin_that_does_not_load_is_told_with_its_error(faults: dict[str, Any]) -> None:
    absent = next(plugin for plugin in faults["plugins"] if plugin["name"] == "absent")
    assert (absent["distribution"], absent["version"], absent["backends"]) == ("maxattn-absent", "1.2", [])
    assert absent["failure"] == "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    assert "Traceback" in absent["traceback"]
    assert any("plugin absent of maxattn-absent: installed, but failed:" in problem for problem in faults["problems"])


@pytest.mark.parametrize(
    ("backend", "failing", "detail"),
    [
        ("wrong", 2, "output is off by"),
        ("wrong_gradient", 4, "gradient of qkv is off by"),
        ("not_a_number", 8, "output is off by nan"),
        ("wrong_shape", 8, "the output is (2, 14, 10, 64) float32, not (2, 14, 10, 2, 32) float32"),
        ("crashing", 8, "RuntimeError: the kernel is gone"),
        ("undecided", 8, "its own check failed: KeyError"),
    ],
)
def test_the_self_check_finds_a_faulty_backend(backend: str, failing: int, detail: str, faults: dict[str, Any]) -> None:
    failed = [check for check in checks(faults, backend) if check["status"] == "failed"]
    assert len(failed) >= failing
    assert detail in failed[0]["detail"]
    assert any(f"backend {backend} failed on cpu" in problem for problem in faults["problems"])


def test_the_self_check_tells_a_fault_of_one_axis_from_the_other(faults: dict[str, Any]) -> None:
    exact = [check for check in checks(faults, "wrong") if "float32" in check["problem"]]
    assert {check["problem"]: check["status"] for check in exact} == {
        "block, full, float32": "ok",
        "block, ragged, float32": "ok",
        "grid, full, float32": "failed",
        "grid, ragged, float32": "failed",
    }


def test_a_backend_for_other_machines_is_no_problem(faults: dict[str, Any]) -> None:
    assert {check["status"] for check in checks(faults, "elsewhere")} == {"unable"}
    assert checks(faults, "elsewhere")[0]["detail"] == "no support for cpu (devices: abacus)"
    assert not any("elsewhere" in problem for problem in faults["problems"])


def test_a_backend_is_asked_only_for_what_it_declares(faults: dict[str, Any]) -> None:
    answers = {(check["problem"].split(", ")[1], check["status"]) for check in checks(faults, "plain")}
    assert answers == {("full", "ok"), ("ragged", "unable")}


def test_the_sound_backends_pass_beside_faulty_ones(faults: dict[str, Any]) -> None:
    assert {check["status"] for backend in ("naive", "sdpa") for check in checks(faults, backend)} == {"ok"}


def test_the_text_lists_problems_and_a_plugin_left_out_is_none(installed: Path) -> None:
    finished = doctor(installed, MAXATTN_PLUGINS="absent")
    assert finished.returncode == 1
    failure = "installed, but failed: ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    assert f"absent  maxattn-absent  1.2      {failure}\n" in finished.stdout
    assert "faulty  maxattn-faulty  1.2      not loaded: MAXATTN_PLUGINS does not name it\n" in finished.stdout
    assert finished.stdout.endswith(f"Problems:\n- plugin absent of maxattn-absent: {failure}\n")
