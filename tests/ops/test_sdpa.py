"""`sdpa` equals `naive`: outputs and gradients, over sizes, windows, dtypes and strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.ops.contract import Axis
from maxattn.ops.sdpa import LARGEST_BATCH, Sdpa

LAYOUTS = ("contiguous", "slice of a larger tensor", "space before batch", "heads first", "3 first", "expanded batch")
BIAS_LAYOUTS = ("contiguous", "transposed", "slice of a larger tensor", "expanded over heads")


@dataclass(frozen=True)
class Case:
    """One call, to be given numbers by `tensors`."""

    axis: Axis
    window: tuple[int, int]
    size: tuple[int, int, int]
    heads: int
    head_dim: int
    scale: float | None
    layout: str
    bias_layout: str | None
    requires_grad: bool
    bias_requires_grad: bool
    seed: int

    def tensors(self, dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Standard normal qkv and bias in the case's layout."""
        generator = torch.Generator().manual_seed(self.seed)
        qkv = self._qkv(generator).to(dtype).requires_grad_(self.requires_grad)
        if self.bias_layout is None:
            return qkv, None
        return qkv, self._bias(generator).to(bias_dtype).requires_grad_(self.bias_requires_grad)

    def _qkv(self, generator: torch.Generator) -> Tensor:
        (B, H, W), h, d = self.size, self.heads, self.head_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        match self.layout:
            case "slice of a larger tensor":
                return normal(B + 2, H + 1, 2 * W, 3, h + 1, d + 3)[1 : B + 1, 1:, ::2, :, 1:, 2 : d + 2]
            case "space before batch":
                return normal(W, H, B, 3, h, d).permute(2, 1, 0, 3, 4, 5)
            case "heads first":
                return normal(h, B, H, W, 3, d).permute(1, 2, 3, 4, 0, 5)
            case "3 first":
                return normal(3, B, h, H, W, d).permute(1, 3, 4, 0, 2, 5)
            case "expanded batch":
                return normal(1, H, W, 3, h, d).expand(B, H, W, 3, h, d)
        return normal(B, H, W, 3, h, d)

    def _bias(self, generator: torch.Generator) -> Tensor:
        h, N = self.heads, self.window[0] * self.window[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        match self.bias_layout:
            case "transposed":
                return normal(N, N, h).permute(2, 1, 0)
            case "slice of a larger tensor":
                return normal(h + 1, N + 2, 2 * N)[1:, 1 : N + 1, ::2]
            case "expanded over heads":
                return normal(1, N, N).expand(h, N, N)
        return normal(h, N, N)


TYPICAL = Case(
    axis="block",
    window=(4, 3),
    size=(2, 9, 10),
    heads=2,
    head_dim=8,
    scale=None,
    layout="contiguous",
    bias_layout="contiguous",
    requires_grad=True,
    bias_requires_grad=True,
    seed=0,
)


def cases(*scales: float | None) -> st.SearchStrategy[Case]:
    sides = st.integers(1, 12)
    return st.builds(
        Case,
        axis=st.sampled_from(("block", "grid")),
        window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        size=st.tuples(st.integers(0, 3), sides, sides),
        heads=st.integers(1, 3),
        head_dim=st.sampled_from((1, 2, 5, 8, 16, 32)),
        scale=st.sampled_from(scales),
        layout=st.sampled_from(LAYOUTS),
        bias_layout=st.sampled_from((None, *BIAS_LAYOUTS)),
        requires_grad=st.booleans(),
        bias_requires_grad=st.booleans(),
        seed=st.integers(0, 2**32),
    )


DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16, bias fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.float16, torch.float32, id="fp16, bias fp32"),
]


def results(case: Case, backend: str) -> list[Tensor]:
    """The output in fp64, and the gradients of what requires one for a random gradient of the output."""
    qkv, bias = case.tensors(torch.float64, torch.float64)
    differentiated = [x for x in (qkv, bias) if x is not None and x.requires_grad]
    with torch.set_grad_enabled(bool(differentiated)):
        out = maxattn.max_sa(qkv, case.axis, case.window, bias, case.scale, backend=backend)
    assert out.requires_grad == bool(differentiated)
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return [out, *(torch.autograd.grad(out, differentiated, grad_out) if differentiated else ())]


def assert_equal_in_fp64(case: Case) -> None:
    """To a few hundred rounding errors of numbers as large as the inputs, which are about 1, or the result."""
    for actual, expected in zip(results(case, "sdpa"), results(case, "naive"), strict=True):
        largest = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=300 * torch.finfo(torch.float64).eps * largest)


@settings(max_examples=500)
@given(cases(None, 0.0, 0.3, 1.0, -0.5))
def test_equals_naive_in_fp64(case: Case) -> None:
    assert_equal_in_fp64(case)


@pytest.mark.parametrize(("dtype", "bias_dtype"), DTYPES)
@given(case=cases(None, 0.0, 0.1, -0.2))
def test_is_within_the_error_budget(dtype: torch.dtype, bias_dtype: torch.dtype, case: Case) -> None:
    qkv, bias = case.tensors(dtype, bias_dtype)
    assert_within_budget(qkv, case.axis, case.window, bias, case.scale, backend="sdpa")


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_takes_a_bias_of_any_dtype(dtype: torch.dtype, bias_dtype: torch.dtype, requires_grad: bool) -> None:
    case = replace(TYPICAL, requires_grad=requires_grad, bias_requires_grad=requires_grad)
    qkv, bias = case.tensors(dtype, bias_dtype)
    assert_within_budget(qkv, "block", (4, 3), bias, backend="sdpa")


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_double_precision_beside_a_coarser_bias(bias_dtype: torch.dtype) -> None:
    qkv, bias = TYPICAL.tensors(torch.float64, bias_dtype)
    wide = bias.detach().double().requires_grad_()
    out, expected = (maxattn.max_sa(qkv, "grid", (4, 3), each, backend="sdpa") for each in (bias, wide))
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    (wide_gradient,) = torch.autograd.grad(expected.square().sum(), wide)
    assert torch.equal(gradient, wide_gradient.to(bias_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((2, 8, 12), id="full windows"),
        pytest.param((2, 9, 12), id="ragged height"),
        pytest.param((2, 8, 10), id="ragged width"),
        pytest.param((2, 9, 10), id="ragged both"),
        pytest.param((2, 3, 2), id="smaller than the window"),
        pytest.param((2, 1, 1), id="one pixel"),
        pytest.param((0, 9, 10), id="empty batch"),
    ],
)
def test_equals_naive_for_every_kind_of_size_and_layout(axis: Axis, size: tuple[int, int, int], layout: str) -> None:
    assert_equal_in_fp64(replace(TYPICAL, axis=axis, size=size, layout=layout))


@pytest.mark.parametrize("axis", ["block", "grid"])
def test_result_is_contiguous(axis: Axis) -> None:
    for size in ((2, 4, 3), (2, 3, 2), (2, 8, 12), (2, 9, 12), (2, 9, 10)):
        for bias_requires_grad in (False, True):
            case = replace(TYPICAL, size=size, bias_requires_grad=bias_requires_grad)
            qkv, bias = case.tensors(torch.float32, torch.float32)
            assert maxattn.max_sa(qkv, axis, (4, 3), bias, backend="sdpa").is_contiguous()


def test_leaves_its_inputs_as_they_were() -> None:
    qkv, bias = TYPICAL.tensors(torch.float32, torch.float32)
    before = qkv.detach().clone(), bias.detach().clone()
    maxattn.max_sa(qkv, "grid", (4, 3), bias, backend="sdpa").sum().backward()
    assert torch.equal(qkv, before[0])
    assert torch.equal(bias, before[1])


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
@pytest.mark.parametrize("bias_layout", [None, "contiguous"])
@pytest.mark.parametrize("bias_requires_grad", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_explain_reports_the_kernel_that_runs(
    requires_grad: bool, bias_requires_grad: bool, bias_layout: str | None, dropout_p: float, dtype: torch.dtype
) -> None:
    case = replace(TYPICAL, requires_grad=requires_grad, bias_requires_grad=bias_requires_grad, bias_layout=bias_layout)
    qkv, bias = case.tensors(dtype, dtype)
    explanation = maxattn.explain(qkv, "block", (4, 3), bias, dropout_p=dropout_p, backend="sdpa")
    assert explanation.kernel in ("flash", "math")
    with Operators() as operators:
        maxattn.max_sa(qkv, "block", (4, 3), bias, dropout_p=dropout_p, backend="sdpa")
    flash = "_scaled_dot_product_flash_attention_for_cpu.default" in operators.names
    assert flash == (explanation.kernel == "flash")


@pytest.mark.parametrize("axis", ["block", "grid"])
def test_serves_more_windows_than_a_cuda_grid_has_rows(axis: Axis) -> None:
    case = replace(TYPICAL, axis=axis, window=(1, 1), size=(1, 2, 32_800), heads=1, head_dim=1)
    assert_equal_in_fp64(case)


@pytest.mark.parametrize("windows", [LARGEST_BATCH - 1, LARGEST_BATCH, LARGEST_BATCH + 1, 2 * LARGEST_BATCH + 1])
@pytest.mark.parametrize("bias_layout", [None, "contiguous"])
def test_splits_more_windows_than_a_cuda_kernel_takes(windows: int, bias_layout: str | None) -> None:
    """The code that runs for CUDA, on tensors of the CPU: nothing in it asks for the GPU."""
    case = replace(TYPICAL, window=(1, 2), size=(1, 1, 2 * windows), heads=1, head_dim=1, bias_layout=bias_layout)
    qkv, bias = case.tensors(torch.float64, torch.float64)
    problem = maxattn.explain(qkv, "block", (1, 2), bias).problem
    calls = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                calls.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    with Counting():
        out = Sdpa().attend(qkv, bias, replace(problem, device="cuda"))
    assert sum(calls) == windows
    assert max(calls) <= LARGEST_BATCH
    assert len(calls) == -(-windows // LARGEST_BATCH)
    expected = maxattn.max_sa(qkv, "block", (1, 2), bias, backend="naive")
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-13)
