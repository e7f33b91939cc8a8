"""Without a GPU the kernels for training run in Triton's interpreter, where they would not be asked for."""

from __future__ import annotations

import pytest
import torch

from maxattn.nn import gpu


@pytest.fixture(autouse=True)
def kernels_serve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "DEVICES", frozenset({"cpu"}))
