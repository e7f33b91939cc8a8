"""What the commands that train ask of PyTorch's allocator on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import write_stripes
from typer.testing import CliRunner

from maxattn.bench import train as bench_train
from maxattn.cli import app, bench_commands, train_commands
from maxattn.cli.memory import SETTINGS, let_segments_grow

GROWING = {SETTINGS[0]: "expandable_segments:True"}


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux with an NVIDIA GPU, and no settings in the environment."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.parametrize("given", SETTINGS)
def test_settings_of_the_environment_stay(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(given, "max_split_size_mb:64")
    let_segments_grow()
    assert settings() == {given: "max_split_size_mb:64"}


@pytest.mark.parametrize(("module", "name", "value"), [(sys, "platform", "win32"), (torch.version, "cuda", None)])
def test_nothing_is_asked_where_pytorch_cannot(
    module: object, name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    let_segments_grow()
    assert settings() == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_train_asks_before_it_uses_a_gpu(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def run_training(*given: object, **options: object) -> list[dict[str, float]]:
        seen.append(settings())
        return [{"val_accuracy": 1.0}]

    monkeypatch.setattr(train_commands, "find_device", lambda name: torch.device(device))
    monkeypatch.setattr(train_commands, "run_training", run_training)
    config = tmp_path / "nano.yaml"
    config.write_text("spec: nano")
    arguments = ["train", str(config), str(write_stripes(tmp_path / "data")), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert seen == [GROWING if device == "cuda" else {}]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_benchmark_of_training_asks_before_it_uses_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(bench_commands, "_where", lambda *given: (device, torch.bfloat16))
    monkeypatch.setattr(bench_train, "measure", lambda *given, **options: seen.append(settings()))
    result = CliRunner().invoke(app, ["bench", "train", "nano"])
    assert result.exit_code == 0, result.output
    assert seen == [GROWING if device == "cuda" else {}]
