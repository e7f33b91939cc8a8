"""`maxattn doctor` tells what is there, and finds what is broken."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plugin_zoo
import pytest
import torch
from plugin_zoo import BROKEN, FAILURES, FINE, RAISING, distribution_of
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


class Chatty(Naive):
    name = "chatty"

    def unsupported(self, problem):
        print("I am asked")
        return []

    def attend(self, qkv, bias, problem):
        print("I attend")
        return super().attend(qkv, bias, problem)


@hookimpl
def maxattn_backends():
    kinds = (Wrong, WrongGradient, NotANumber, WrongShape, Crashing, Undecided, Elsewhere, Plain, Chatty)
    return [kind() for kind in kinds]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution whose plugin gives faulty backends, beside the whole zoo of plugins."""
    folder = tmp_path_factory.mktemp("site")
    plugin_zoo.install_all(folder)
    plugin_zoo.install(folder, [("faulty", PLUGINS)])
    return folder


def doctor(installed: Path, *arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("MAXATTN_")}
    path = os.pathsep.join([str(REPOSITORY), str(installed), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "maxattn", *before.split(), "doctor", *arguments],
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


def plugin_of(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(plugin for plugin in facts["plugins"] if plugin["name"] == name)


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


@pytest.mark.parametrize("plugin", BROKEN)
def test_a_plugin_that_does_not_load_is_told_with_its_tracebacks_last_line(plugin: str, faults: dict[str, Any]) -> None:
    found = plugin_of(faults, plugin)
    assert (found["distribution"], found["version"], found["backends"]) == (distribution_of(plugin), "1.2", [])
    told = f"plugin {plugin} of {distribution_of(plugin)}: installed, but failed: {found['failure']}"
    assert told in faults["problems"]
    last_line = found["traceback"].splitlines()[-1].strip()
    assert re.sub(r"^[\w.]+\.(?=\w+:)", "", last_line) in told


@pytest.mark.parametrize("plugin", FINE)
def test_a_sound_plugin_is_told_with_its_backends_beside_broken_ones(plugin: str, faults: dict[str, Any]) -> None:
    assert plugin_of(faults, plugin)["backends"] == [plugin]
    assert {check["status"] for check in checks(faults, plugin)} == {"ok"}


@pytest.mark.parametrize("plugin", RAISING)
def test_a_backend_that_raises_when_it_is_asked_is_a_problem(plugin: str, faults: dict[str, Any]) -> None:
    told = [problem for problem in faults["problems"] if f"backend {plugin} " in problem]
    shown = "block, full, float32; and 7 more"
    failure = FAILURES.get(plugin, "LookupError: asked and failed")
    assert told == [f"backend {plugin} failed on cpu ({shown}): its own check failed: {failure}"]


def test_a_backend_that_cannot_tell_its_kernel_is_a_problem(faults: dict[str, Any]) -> None:
    told = [problem for problem in faults["problems"] if "raises_in_kernel" in problem]
    assert told == ["backend raises_in_kernel cannot tell its kernel on cpu: LookupError: asked and failed"]


def test_a_plugin_that_is_slow_to_load_is_noted_and_is_no_problem(faults: dict[str, Any]) -> None:
    assert plugin_of(faults, "slow")["seconds"] > 1
    (note,) = (note for note in faults["notes"] if note.startswith("plugin slow "))
    assert note.startswith("plugin slow of slow-dist took 1.")
    assert note.endswith(" s to load: import its library at first use, inside attend")
    assert not any("slow" in problem for problem in faults["problems"])


@pytest.mark.parametrize(
    ("backend", "failing", "detail"),
    [
        ("wrong", 2, "out (max): error "),
        ("wrong_gradient", 4, "dv (max): error "),
        ("not_a_number", 8, "out (max): error nan"),
        ("wrong_shape", 8, "the output is (2, 14, 10, 64), not (2, 14, 10, 2, 32)"),
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


def test_what_a_backend_prints_is_not_among_the_facts(faults: dict[str, Any]) -> None:
    assert {check["status"] for check in checks(faults, "chatty")} == {"ok"}  # `faults` is all of stdout, read as JSON


def test_a_backend_for_other_machines_is_no_problem(faults: dict[str, Any]) -> None:
    assert {check["status"] for check in checks(faults, "elsewhere")} == {"unable"}
    assert checks(faults, "elsewhere")[0]["detail"] == "no support for cpu (devices: abacus)"
    assert not any("elsewhere" in problem for problem in faults["problems"])


def test_a_backend_is_asked_only_for_what_it_declares(faults: dict[str, Any]) -> None:
    answers = {(check["problem"].split(", ")[1], check["status"]) for check in checks(faults, "plain")}
    assert answers == {("full", "ok"), ("ragged", "unable")}


def test_the_sound_backends_pass_beside_faulty_ones(faults: dict[str, Any]) -> None:
    assert {check["status"] for backend in ("naive", "sdpa") for check in checks(faults, backend)} == {"ok"}


def test_the_text_lists_problems_and_notes_and_a_plugin_left_out_is_neither(installed: Path) -> None:
    finished = doctor(installed, MAXATTN_PLUGINS="import_error,slow")
    assert finished.returncode == 1
    failure = "installed, but failed: ModuleNotFoundError: No module named 'a_library_that_is_missing'"
    rows = [re.sub(" +", " ", line) for line in finished.stdout.splitlines()]
    assert f"import_error import-error-dist 1.2 {failure}" in rows
    assert "faulty faulty-dist 1.2 not loaded: MAXATTN_PLUGINS does not name it" in rows
    assert rows[-6:-2] == ["", "Problems:", f"- plugin import_error of import-error-dist: {failure}", ""]
    assert rows[-2] == "Notes:"
    assert rows[-1].startswith("- plugin slow of slow-dist took 1.")


def test_what_is_told_as_a_fact_is_not_logged_as_well_unless_that_is_asked_for(installed: Path) -> None:
    assert doctor(installed, MAXATTN_PLUGINS="import_error,raises_in_unsupported").stderr == ""
    logged = doctor(installed, before="--verbose", MAXATTN_PLUGINS="import_error").stderr
    assert "plugin import_error of import-error-dist is installed but failed" in logged
