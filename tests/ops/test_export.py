"""`torch.export`, strict and not: any batch, and any height and width by the specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import maxattn
from maxattn.ops.contract import Axis

# PyTorch treats a dimension of 1 apart, here that of a single window: a window of 4 needs 5 pixels to have a second.
HEIGHT_AND_WIDTH = {1: Dim("height", min=5), 2: Dim("width", min=5)}


class Attention(nn.Module):
    def __init__(self, axis: Axis, backend: str | None = None) -> None:
        super().__init__()
        self.axis, self.backend = axis, backend
        self.bias = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, qkv: Tensor) -> Tensor:
        return maxattn.max_sa(qkv, self.axis, [4, 4], self.bias, backend=self.backend)


def exported(module: nn.Module, strict: bool, dynamic: dict[int, Any]) -> ExportedProgram:
    qkv = torch.randn(3, 9, 8, 3, 2, 4)
    return export(module, (qkv,), dynamic_shapes=({**dynamic},) if dynamic else None, strict=strict)


def operators(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize(
    ("dynamic", "backend", "sizes"),
    [
        pytest.param({}, "sdpa", [(3, 9, 8)], id="static"),
        pytest.param({0: Dim("batch")}, "sdpa", [(3, 9, 8), (5, 9, 8)], id="batch"),
        pytest.param(HEIGHT_AND_WIDTH, "naive", [(3, 9, 8), (3, 5, 13)], id="height and width"),
        pytest.param({0: Dim("batch"), **HEIGHT_AND_WIDTH}, "naive", [(5, 8, 16), (2, 7, 5)], id="all"),
    ],
)
def test_equals_eager_for_every_size_that_is_dynamic(
    dynamic: dict[int, Any], backend: str, sizes: list[tuple[int, int, int]], axis: Axis, strict: bool
) -> None:
    module = Attention(axis)
    program = exported(module, strict, dynamic)
    assert ("aten.scaled_dot_product_attention.default" in operators(program)) == (backend == "sdpa")
    for size in sizes:
        qkv = torch.randn(*size, 3, 2, 4)
        torch.testing.assert_close(program.module()(qkv), module(qkv))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_sdpa_forced_with_a_dynamic_size_raises_with_the_reason(strict: bool) -> None:
    with pytest.raises(Exception, match="export a fixed height and width; the batch may be dynamic"):
        exported(Attention("grid", "sdpa"), strict, HEIGHT_AND_WIDTH)


@pytest.mark.parametrize("unknown", [{"height": None}, {"width": None}, {"height": None, "width": None}])
def test_sdpa_declines_a_dynamic_size_where_exported_and_only_there(unknown: dict[str, None]) -> None:
    qkv = torch.zeros(1, 9, 8, 3, 2, 4)
    compiled = replace(maxattn.explain(qkv, "grid", 4).problem, compiling=True, **unknown)
    assert maxattn.explain(compiled).backend == "sdpa"
    explanation = maxattn.explain(replace(compiled, exporting=True))
    assert explanation.backend == "naive"
    (reasons,) = [candidate.reasons for candidate in explanation.candidates if candidate.name == "sdpa"]
    assert [reason.code for reason in reasons] == ["dynamic_size"]
    assert maxattn.explain(replace(compiled, exporting=True, height=9, width=8, batch=None)).backend == "sdpa"


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_use_backend_is_heeded(strict: bool) -> None:
    with maxattn.use_backend("naive"):
        program = exported(Attention("block"), strict, {})
    assert "aten.scaled_dot_product_attention.default" not in operators(program)
