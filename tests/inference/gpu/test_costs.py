"""The bytes that a network is said to move are those of the tensors that its kernels are given and return."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.inference import gpu
from maxattn.inference.gpu.costs import costs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {
    "convolution": {"stem"},
    "depthwise": {"depthwise"},
    "pointwise": {"expansion", "projection", "qkv", "proj"},
    "mlp": {"mlp"},
}
"""The kinds of costs of each operator."""
SPEC = {
    "num_classes": 0,
    "head_dim": 8,
    "window": 3,
    "stem": {"width": 8},
    "shortcut_conv": "width",
    "head": {"kind": "linear"},
    "stages": [{"width": 8, "depth": 2}],
}


class Moved(TorchDispatchMode):
    """Bytes of the tensors that each operator of ours is given and returns, but for what is summed up beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        library, _, name = func.name().partition("::")
        if library == "maxattn_inference":
            given = {of.name: value for of, value in zip(func._schema.arguments, args, strict=False)}
            given["out"] = result if isinstance(result, Tensor) else result[0]
            tensors = [value for key, value in given.items() if isinstance(value, Tensor) and key != "column_sums"]
            self.bytes[name.partition(".")[0]] += sum(tensor.nbytes for tensor in tensors)
        return result


@pytest.mark.parametrize("overrides", [{}, {"se_ratio": 0}, {"mlp_ratio": 0}], ids=str)
def test_counted(overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", frozenset({DEVICE}))
    model = maxattn.build(SPEC, **overrides).to(DEVICE, torch.float16)
    said = costs(model, 2, (20, 12))
    with Moved() as moved, torch.no_grad():
        maxattn.optimize_for_inference(model)(torch.randn(2, 3, 20, 12, device=DEVICE, dtype=torch.float16))
    for kernel, kinds in KERNELS.items():
        assert moved.bytes[kernel] == sum(cost.bytes for cost in said if cost.kind in kinds), kernel
