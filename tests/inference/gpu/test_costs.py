"""The bytes that a network is said to move are those of the tensors that its kernels are given and return."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.inference.gpu import launches
from maxattn.inference.gpu.costs import costs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = {
    "maxattn_inference::convolution": "convolution",
    "maxattn_inference::depthwise": "depthwise",
    "maxattn_inference::mlp": "mlp",
    "maxattn_inference::narrow": "product",
    "maxattn_inference::norm": "norm",
    "maxattn_inference::pointwise": "product",
    "aten::addmm": "product",
    "aten::_addmm_activation": "product",
    "maxattn_inference::pool": "pool",
}
"""What each operator that moves a network's pixels computes."""
KINDS = {
    "stem": "convolution",
    "depthwise": "depthwise",
    "mlp": "mlp",
    "norm": "norm",
    **dict.fromkeys(("expansion", "projection", "squeeze_excite", "shortcut", "qkv", "proj"), "product"),
}
"""What the kinds of costs count; attention and the head are others'."""
SPEC = {
    "num_classes": 0,
    "head_dim": 8,
    "window": 3,
    "stem": {"width": 8},
    "shortcut_conv": "width",
    "head": {"kind": "linear"},
    "stages": [{"width": 16, "depth": 1, "layers": ["mbconv", "grid"]}],
}


class Moved(TorchDispatchMode):
    """Bytes of the tensors that each operator is given and returns, but for what is summed up beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computed = OPERATORS.get(func.name().partition(".")[0])
        if computed is not None:
            given = {of.name: value for of, value in zip(func._schema.arguments, args, strict=False)}
            given["out"] = result if isinstance(result, Tensor) else result[0]
            self.bytes[computed] += sum(value.nbytes for value in given.values() if isinstance(value, Tensor))
        return result


@pytest.mark.parametrize(
    ("overrides", "channels"),
    [({}, 512), ({"se_ratio": 0}, 512), ({"mlp_ratio": 0}, 512), ({}, 8), ({"stages.0.width": 24}, 512)],
    ids=str,
)
def test_counted(overrides: dict[str, Any], channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "NARROW", channels)
    model = maxattn.build(SPEC, **overrides).to(DEVICE, torch.float16)
    said: Counter[str] = Counter()
    for cost in costs(model, 2, (12, 8)):
        if cost.kind in KINDS:
            last = cost.name.rpartition(".")[2]
            said[{"pool": "pool", "fc1": "product", "fc2": "product"}.get(last, KINDS[cost.kind])] += cost.bytes
    with Moved() as moved, torch.no_grad():
        maxattn.optimize_for_inference(model)(torch.randn(2, 3, 12, 8, device=DEVICE, dtype=torch.float16))
    assert moved.bytes == said
