"""`sdpa` keeps to the contract, tells the kernel it uses, and splits more windows than a CUDA kernel takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn import Problem
from maxattn.ops.sdpa import Sdpa
from maxattn.ops.windows import LARGEST_BATCH
from maxattn.testing import Case, parametrize_with_backend_checks

PROBLEM = Problem(axis="block", window=(4, 3), batch=2, height=9, width=10, heads=2, head_dim=8)


@parametrize_with_backend_checks("sdpa", examples=200)
def test_conformance(check: Any) -> None:
    check()


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.__name__)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bias_requires_grad", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_explain_reports_the_kernel_that_runs(
    requires_grad: bool, bias_requires_grad: bool, bias: bool, dropout_p: float, dtype: torch.dtype
) -> None:
    gradients = {"requires_grad": requires_grad, "bias_requires_grad": bias_requires_grad}
    problem = replace(PROBLEM, dtype=dtype, bias=dtype if bias else None, dropout_p=dropout_p, **gradients)
    qkv, table, _ = Case(problem=problem).tensors()
    explanation = maxattn.explain(qkv, "block", (4, 3), table, dropout_p=dropout_p, backend="sdpa")
    assert explanation.kernel in ("flash", "math")
    with Operators() as operators:
        maxattn.max_sa(qkv, "block", (4, 3), table, dropout_p=dropout_p, backend="sdpa")
    flash = "_scaled_dot_product_flash_attention_for_cpu.default" in operators.names
    assert flash == (explanation.kernel == "flash")


@pytest.mark.parametrize("windows", [LARGEST_BATCH - 1, LARGEST_BATCH, LARGEST_BATCH + 1, 2 * LARGEST_BATCH + 1])
@pytest.mark.parametrize("bias", [None, torch.float64])
def test_splits_more_windows_than_a_cuda_kernel_takes(windows: int, bias: torch.dtype | None) -> None:
    """The code that runs for CUDA, on tensors of the CPU: nothing in it asks for the GPU."""
    sizes = {"window": (1, 2), "batch": 1, "height": 1, "width": 2 * windows, "heads": 1, "head_dim": 1}
    problem = replace(PROBLEM, **sizes, dtype=torch.float64, bias=bias)
    qkv, table, _ = Case(problem=problem).tensors()
    calls = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is F.scaled_dot_product_attention:
                calls.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    with Counting():
        out = Sdpa().attend(qkv, table, replace(problem, device="cuda"))
    assert sum(calls) == windows
    assert max(calls) <= LARGEST_BATCH
    assert len(calls) == -(-windows // LARGEST_BATCH)
    expected = maxattn.max_sa(qkv, "block", (1, 2), table, backend="naive")
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-13)
