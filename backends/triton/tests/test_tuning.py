"""Launches are measured on this machine, kept on disk under a stamp, and used by processes to come."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from maxattn.ops.contract import Problem
from maxattn.ops.registry import registered
from maxattn_triton import Triton, configs, tuned, tuning
from maxattn_triton.__main__ import app
from maxattn_triton.configs import Key, Launch
from maxattn_triton.tuning import Measured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = Problem(
    axis="grid",
    window=(2, 2),
    batch=1,
    height=4,
    width=4,
    heads=1,
    head_dim=16,
    dtype=torch.float16,
    device=DEVICE,
    compute_capability=torch.cuda.get_device_capability() if DEVICE == "cuda" else None,
    bias=torch.float16,
    requires_grad=True,
    bias_requires_grad=True,
)
FORWARD = Key("rows.forward", 4, 16, 2)
TWO = [Launch(16, 16, 4, 1, 1), Launch(16, 16, 2, 1, 1)]
SMALL = {"block_m": 16, "block_n": 16, "stages": 1, "programs": 1}


@pytest.fixture
def begin_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_by_default", lambda key: TWO[0])


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "cache" / "launches.json"
    monkeypatch.setenv("MAXATTN_TRITON_LAUNCHES", str(path))
    tuned._read.cache_clear()
    with registered(Triton()):
        yield path
    tuned._read.cache_clear()


@pytest.mark.usefixtures("begin_small")
def test_the_fastest_launch_of_each_kernel_is_kept_and_used(file: Path) -> None:
    found = tuning.tune(PROBLEM, lambda key: [[{"warps": 2}, {"warps": 4}]])
    assert [one.key.kernel for one in found] == ["rows.forward"] * 2 + ["whole.backward"] * 2
    assert [one.launch for one in found[:2]] == TWO
    assert all(one.milliseconds is not None and one.milliseconds > 0 and one.first_call > 0 for one in found)
    fastest = min(found[:2], key=lambda one: one.milliseconds or 0.0)
    assert configs.launch(FORWARD) == fastest.launch
    (kept,) = json.loads(file.read_text(encoding="utf-8")).items()
    assert kept[0] == tuned.stamp(0)
    assert len(kept[1]) == 2


def test_another_process_uses_it(file: Path) -> None:
    tuned.save({FORWARD: TWO[1]})
    program = f"from maxattn_triton import configs; print(*configs.launch(configs.Key{tuple(FORWARD)}))"
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "MAXATTN_TRITON_LAUNCHES": str(file)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [str(part) for part in TWO[1]]


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_the_drivers_version_is_asked_of_the_driver(hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(number: Any) -> int:
        number._obj.value = 13000
        return 0

    drivers: dict[str, object] = {
        "libcuda.so.1": SimpleNamespace(cuDriverGetVersion=version),
        "libamdhip64.so": SimpleNamespace(hipDriverGetVersion=version),
    }
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(tuned.ctypes, "CDLL", drivers.__getitem__)
    assert tuned.driver_version() == "13000"


@pytest.mark.parametrize("driver", [OSError("no such file"), SimpleNamespace()], ids=["no driver", "no such function"])
def test_without_a_driver_its_version_is_unknown(driver: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(tuned.ctypes, "CDLL", load)
    assert tuned.driver_version() == "unknown"


def test_a_launch_of_another_stamp_is_not_used(file: Path) -> None:
    default = configs.launch(FORWARD)
    tuned.save({FORWARD: TWO[1]})
    file.write_text(file.read_text(encoding="utf-8").replace(tuned.stamp(0), "gpu another"), encoding="utf-8")
    tuned._read.cache_clear()
    assert configs.launch(FORWARD) == default
    tuned.save({FORWARD: TWO[0]})
    assert set(json.loads(file.read_text(encoding="utf-8"))) == {"gpu another", tuned.stamp(0)}


@pytest.mark.parametrize("text", ["{", "[]", '{"gpu": [{"kernel": "rows.forward"}]}', '{"gpu": 3}'])
def test_a_file_that_cannot_be_read_is_left_aside_with_a_warning(
    text: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="maxattn"):
        assert configs.launch(FORWARD) == configs._by_default(FORWARD)
    assert f"{file} is left aside" in caplog.text


def test_a_launch_that_fails_is_told_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    three_keys = Launch(3, 3, 4, 1, 1)  # no power of two: no kernel takes such tiles
    monkeypatch.setattr(configs, "_by_default", lambda key: three_keys)
    found = tuning.tune(replace(PROBLEM, requires_grad=False, bias_requires_grad=False), lambda key: [[SMALL]])
    assert found[0].milliseconds is None
    assert found[0].failure
    assert configs.launch(FORWARD) == TWO[0]


def test_a_place_that_launches_cannot_be_kept_in_is_told_before_any_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "launches.json"
    monkeypatch.setenv("MAXATTN_TRITON_LAUNCHES", str(place))
    monkeypatch.setattr(tuning, "tune", lambda *given, **options: pytest.fail("it measured"))
    result = CliRunner().invoke(app, ["--device", DEVICE, "--window", "2", "--size", "4", "--head-dim", "16"])
    assert result.exit_code == 2
    assert f"Error: launches could not be kept in {place}: " in result.stderr
    assert "MAXATTN_TRITON_LAUNCHES names another file" in result.stderr


def test_no_launch_that_works_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_by_default", lambda key: Launch(3, 3, 4, 1, 1))
    with pytest.raises(RuntimeError, match=r"no launch of rows\.forward works: "):
        tuning.tune(PROBLEM, lambda key: [])


@pytest.mark.parametrize("begin_with", TWO)
def test_each_step_starts_from_the_fastest_before(begin_with: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_by_default", lambda key: begin_with)
    monkeypatch.setattr(
        tuning,
        "_measure",
        lambda key, launch, problem: Measured(key, launch, milliseconds=10.0 - launch.warps - 0.1 * launch.stages),
    )
    found = tuning.tune(PROBLEM, lambda key: [[{"warps": 2}, {"warps": 4}], [{"stages": 2}, {"stages": 1}]])
    (forward, _) = (list(group) for _, group in groupby(found, lambda one: one.key.kernel))
    assert [one.launch for one in forward] == [
        begin_with,
        Launch(16, 16, 6 - begin_with.warps, 1, 1),
        Launch(16, 16, 4, 2, 1),
    ]
    assert configs.launch(FORWARD) == Launch(16, 16, 4, 2, 1)


def test_usual_steps_are_of_launches_that_kernels_take() -> None:
    for tokens in (1, 49, 144, 784):
        for key in configs.keys(replace(PROBLEM, window=(tokens, 1))):
            tiles, rest = tuning.usual_steps(key)
            assert {tuple(sorted(step)) for step in tiles} == {("block_m", "block_n", "warps")}
            assert len(rest) >= 4
            assert all(size & (size - 1) == 0 for step in tiles for size in step.values())
