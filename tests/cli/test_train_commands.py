"""`maxattn train`, `maxattn eval` and `maxattn predict`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_training import CLASSES, RECIPE, SPEC, write_stripes
from typer.testing import CliRunner, Result

import maxattn
from maxattn.cli import app

Run = Callable[..., Result]
LEARNING = {**RECIPE, "epochs": 8, "batch_size": 8, "lr": 0.01}


def write_config(path: Path, **recipe: object) -> Path:
    path.write_text(yaml.safe_dump({"spec": SPEC, "recipe": {**LEARNING, **recipe}}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that the command `train` writes."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder / "stripes.yaml")
    result = CliRunner().invoke(app, ["train", str(config), str(data), "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    assert f"of the held-out images are right; the weights: {folder / 'out/model.safetensors'}" in result.stdout
    assert [line[:9] for line in result.stdout.splitlines()[:8]] == [f"epoch {number}/8" for number in range(1, 9)]
    return folder / "out/model.safetensors"


def test_eval_measures_what_train_reported(run: Run, data: Path, model: Path) -> None:
    last = json.loads((model.parent / "metrics.jsonl").read_text().splitlines()[-1])
    facts = json.loads(run("eval", str(model), str(data), "--json").stdout)
    assert facts["images"] == 24
    assert facts["accuracy"] == last["val_accuracy"] > 0.9
    assert facts["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert facts["images_per_second"] > 0
    assert (
        f"{facts['accuracy']:.2%} of 24 images in {data / 'val'} are right" in run("eval", str(model), str(data)).stdout
    )


def test_eval_takes_class_folders_too(run: Run, data: Path, model: Path) -> None:
    assert json.loads(run("eval", str(model), str(data / "train"), "--json").stdout)["images"] == 72


@pytest.mark.parametrize("backend", ["naive", "sdpa", "nonsense, naive"])
def test_every_backend_gives_the_same_loss(run: Run, data: Path, model: Path, backend: str) -> None:
    loss = json.loads(run("eval", str(model), str(data), "--json").stdout)["loss"]
    other = json.loads(run("eval", str(model), str(data), "--backend", backend, "--json").stdout)["loss"]
    assert other == pytest.approx(loss, rel=1e-4)


def test_a_backend_asked_for_in_the_environment_is_used(
    run: Run, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "nonsense")
    for arguments in (("eval", str(model), str(data)), ("predict", str(model), str(data))):
        assert "no backend is named 'nonsense'" in run(*arguments, exit_code=2).stderr


def test_predict_names_the_likeliest_classes_first(run: Run, data: Path, model: Path) -> None:
    files = [data / "val" / name / "000.png" for name in CLASSES]
    found = json.loads(run("predict", str(model), *map(str, files), "--top", "2", "--json").stdout)
    assert [one["image"] for one in found] == list(map(str, files))
    for name, one in zip(CLASSES, found, strict=True):
        first, second = one["predictions"]
        assert first["class"] == name
        assert 1 >= first["probability"] >= second["probability"] >= 0


def test_predict_takes_folders_and_shows_a_row_an_image(run: Run, data: Path, model: Path) -> None:
    lines = run("predict", str(model), str(data / "val/down"), "--top", "9", "--batch-size", "3").stdout.splitlines()
    assert lines[0].split() == ["image", "1.", "2.", "3."]
    assert [line.split()[0] for line in lines[1:]] == [str(data / f"val/down/{number:03}.png") for number in range(8)]
    assert all(line.count("%") == 3 for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none.yaml", "{data}", "--out", "out"), "there is no config none.yaml"),
        (("train", "{config}", "none", "--out", "out"), "there is no folder none/train; images lie in"),
        (("train", "{config}", "{data}", "--out", "{data}"), "is not empty: --resume goes on"),
        (("train", "{config}", "{data}", "--out", "out", "--resume"), "there is no out/checkpoint.pt to resume from"),
        (("train", "{config}", "{data}", "--out", "out", "--device", "tpu"), "'tpu' is not one of"),
        (("eval", "none.safetensors", "{data}"), "there is no weights file none.safetensors"),
        (("eval", "{config}", "{data}"), "is no weights file"),
        (("eval", "{model}", "none"), "there is no folder none"),
        (("eval", "{model}", "{data}"), "has images of zigzag, but the known classes are across, down, slanted"),
        (("predict", "{model}", "none.png"), "there is no image none.png"),
        (("predict", "{model}", "{config}"), "cannot read the image"),
        (("predict", "{model}", "."), "no images in .; images end in"),
        (("predict", "{model}", "--top", "0", "{data}"), "Invalid value for '--top'"),
    ],
)
def test_wrong_input_is_told_in_one_message(
    run: Run, tmp_path_factory: pytest.TempPathFactory, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    folder = tmp_path_factory.mktemp("wrong")
    data = write_stripes(folder / "data", train=1, val=1)
    (data / "val/across").rename(data / "val/zigzag")
    names = {"config": write_config(folder / "stripes.yaml"), "data": data, "model": model}
    result = run(*(argument.format(**names) for argument in arguments), exit_code=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_training_that_diverges_ends_with_exit_code_1(run: Run, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "stripes.yaml", lr=1e30, clip_grad=None)
    result = run("train", str(config), str(data), "--out", "out", exit_code=1)
    assert "Error: the loss is" in result.stderr
    assert "a lower lr than 1e+30" in result.stderr


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(maxattn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "maxattn", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_with_130_and_resuming_finishes_it(
    run: Run, data: Path, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(tmp_path / "stripes.yaml")
    command = ("train", str(config), str(data), "--out", str(tmp_path / "out"))
    process = start(*command)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch 1/8")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"everything is in {tmp_path / 'out/checkpoint.pt'}" in errors
    assert f"to go on: maxattn {' '.join(command)} --resume" in errors
    assert "Traceback" not in errors

    lines = run(*command, "--resume").stdout.splitlines()
    assert lines[-2].startswith("epoch 8/8")
    ours, theirs = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path / "out", model.parent)
    )
    assert [line["train_loss"] for line in ours] == [line["train_loss"] for line in theirs]
    assert [line["val_loss"] for line in ours] == [line["val_loss"] for line in theirs]


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_help_teaches_by_example(run: Run, command: str) -> None:
    text = run(command, "--help").stdout
    assert f"$ maxattn {command} " in text
