"""The demo, on a few images in place of the digits, which it takes if they are there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maxattn
from maxattn.train import Classifier, load_config
from maxattn.train.classifier import find_device

DEMO = Path(__file__).parents[2] / "examples/digits/demo.py"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(maxattn.__file__).parents[1]), "COLUMNS": "200"}
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_its_config_is_the_nano_network_on_grey_images() -> None:
    spec, nano = load_config(DEMO.parent / "digits.yaml").spec, maxattn.load_spec("nano")
    assert spec.override(num_classes=10) == nano.override(in_chans=1)


def test_its_help_tells_what_it_does() -> None:
    result = run_demo("--help")
    assert result.returncode == 0
    assert "maxattn train examples/digits/digits.yaml" in result.stdout


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that nobody can tell apart, as the demo keeps its digits."""
    out = tmp_path_factory.mktemp("demo")
    random = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 4)):
        for digit in range(10):
            folder = out / "digits" / part / str(digit)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{number}.png")
    return out


def test_it_compares_every_backend_draws_and_fails_below_its_goal(noise: Path) -> None:
    for _ in range(2):
        result = run_demo("--out", str(noise))
        assert result.returncode == 1, result.stderr
        assert "of the held-out digits are right under" in result.stderr
        for backend in maxattn.list_backends():
            assert f"│ {backend}" in result.stdout
        for name in ("model.safetensors", "predictions.png", "attention.png"):
            assert f"wrote {noise / name}" in result.stdout
    assert Classifier.open(noise / "model.safetensors", find_device("cpu")).classes == tuple("0123456789")
    with Image.open(noise / "attention.png") as picture:
        assert picture.size[0] > 1000
