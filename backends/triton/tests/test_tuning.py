"""Launches are measured on this machine, kept on disk under a stamp, and used by processes to come."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maxattn.ops.contract import Problem
from maxattn.ops.registry import registered
from maxattn_triton import Triton, configs, tuned, tuning
from maxattn_triton.configs import Key, Launch

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


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "cache" / "launches.json"
    monkeypatch.setenv("MAXATTN_TRITON_LAUNCHES", str(path))
    tuned._read.cache_clear()
    with registered(Triton()):
        yield path
    tuned._read.cache_clear()


def test_the_fastest_launch_of_each_kernel_is_kept_and_used(file: Path) -> None:
    found = tuning.tune(PROBLEM, lambda key: TWO)
    assert [one.key.kernel for one in found] == ["rows.forward"] * 2 + ["whole.backward"] * 2
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


def test_a_launch_that_fails_is_told_and_not_kept() -> None:
    three_keys = Launch(3, 3, 4, 1, 1)  # no power of two: no kernel takes such tiles
    found = tuning.tune(
        replace(PROBLEM, requires_grad=False, bias_requires_grad=False), lambda key: [three_keys, TWO[0]]
    )
    assert found[0].milliseconds is None
    assert found[0].failure
    assert configs.launch(FORWARD) == TWO[0]


def test_no_launch_that_works_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no launch of rows\.forward works: "):
        tuning.tune(PROBLEM, lambda key: [Launch(3, 3, 4, 1, 1)])


def test_candidates_begin_with_what_is_used_and_hold_nothing_twice() -> None:
    for tokens in (1, 49, 144, 784):
        for key in configs.keys(replace(PROBLEM, window=(tokens, 1))):
            found = tuning.candidates(key)
            assert found[0] == configs.launch(key)
            assert len(found) == len(set(found)) > 4
