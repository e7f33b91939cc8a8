"""The kernels serve the device that the tests run on: a GPU, or a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from maxattn.inference import gpu
from maxattn.inference.gpu import launches


@pytest.fixture(autouse=True)
def kernels_serve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(launches, "LIBRARY", frozenset({"none", "relu", "gelu"}))  # as PyTorch's CPU has them
