"""Without a GPU the kernels for training run in Triton's interpreter, where they would not be asked for."""

from __future__ import annotations

import pytest
import torch

from maxattn.nn.gpu import serving


@pytest.fixture(autouse=True)
def kernels_serve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(serving, "DEVICES", frozenset({"cpu"}))
