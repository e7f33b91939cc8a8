"""The error budget accepts rounding and rejects mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maxattn
from maxattn import Backend, Problem
from maxattn.ops.contract import Axis
from maxattn.ops.registry import registered
from maxattn.testing.case import Case, Inputs
from maxattn.testing.failure import CheckFailed
from maxattn.testing.observe import attend_by, observe, within_budget

Attend = Callable[[Tensor, Tensor, Problem], Tensor]


def exact(qkv: Tensor, bias: Tensor, problem: Problem, scale: float | None = None) -> Tensor:
    """What is right, for the mistakes below to spoil."""
    return maxattn.max_sa(qkv, problem.axis, problem.window, bias, scale, backend="naive")


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, with a gradient that is off by `factor`."""
    return x * factor + (x * (1 - factor)).detach()


def bias_in_bf16(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, bias.to(torch.bfloat16), problem)


def qkv_in_bf16(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv.to(torch.bfloat16), bias, problem).to(qkv.dtype)


def scale_off_by_1_percent(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, bias, problem, problem.softmax_scale * 1.01)


def scale_off_by_5_percent(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, bias, problem, problem.softmax_scale * 1.05)


def bias_transposed(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, bias.transpose(1, 2), problem)


def bias_of_the_next_head(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, bias.roll(1, 0), problem)


def zero_padding_as_keys(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    H, W = qkv.shape[1:3]
    padded = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, -W % problem.window[1], 0, -H % problem.window[0]))
    return exact(padded, bias, problem)[:, :H, :W].contiguous()


def keys_transposed_with_values(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv[:, :, :, [0, 2, 1]], bias, problem)


def no_gradient_of_bias(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, scaled_gradient(bias, 0.0), problem)


def gradient_of_bias_off_by_5_percent(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    return exact(qkv, scaled_gradient(bias, 1.05), problem)


def gradient_of_q_off_by_5_percent(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    q, k, v = qkv.unbind(3)
    return exact(torch.stack((scaled_gradient(q, 1.05), k, v), 3), bias, problem)


def gradient_of_k_off_by_5_percent(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    q, k, v = qkv.unbind(3)
    return exact(torch.stack((q, scaled_gradient(k, 1.05), v), 3), bias, problem)


def gradient_of_v_off_by_5_percent(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    q, k, v = qkv.unbind(3)
    return exact(torch.stack((q, k, scaled_gradient(v, 1.05)), 3), bias, problem)


def one_pixel_off(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    wrong = torch.zeros_like(qkv[:, :, :, 0])
    wrong[-1, -1, -1, -1, -1] = 0.25
    return exact(qkv, bias, problem) + wrong


def one_nan(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
    wrong = torch.zeros_like(qkv[:, :, :, 0])
    wrong[-1, -1, -1, -1, -1] = float("nan")
    return exact(qkv, bias, problem) + wrong


ANY_DTYPE = [
    scale_off_by_5_percent,
    bias_transposed,
    bias_of_the_next_head,
    zero_padding_as_keys,
    keys_transposed_with_values,
    no_gradient_of_bias,
    gradient_of_bias_off_by_5_percent,
    gradient_of_q_off_by_5_percent,
    gradient_of_k_off_by_5_percent,
    gradient_of_v_off_by_5_percent,
    one_pixel_off,
    one_nan,
]
SINGLE_PRECISION = [bias_in_bf16, qkv_in_bf16, scale_off_by_1_percent]


def assert_within_budget(attend: Attend, axis: Axis, qkv: Tensor, bias: Tensor) -> None:
    """Give `attend` to the budget as a backend, on an image of ragged windows."""
    batch, height, width, _, heads, head_dim = qkv.shape
    problem = Problem(
        axis=axis,
        window=(4, 4),
        batch=batch,
        height=height,
        width=width,
        heads=heads,
        head_dim=head_dim,
        dtype=qkv.dtype,
        bias=bias.dtype,
        requires_grad=qkv.requires_grad,
        bias_requires_grad=bias.requires_grad,
    )
    grad_out = torch.randn(qkv[:, :, :, 0].shape, generator=torch.Generator().manual_seed(0)).to(qkv.dtype)
    inputs, case = Inputs(qkv, bias, grad_out), Case(problem=problem)
    with registered(Spoilt(attend)):
        within_budget(observe(attend_by("spoilt", case), inputs, case), inputs, case)


class Spoilt(Backend):
    name = "spoilt"

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        assert bias is not None
        return self._attend(qkv, bias, problem)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 10, 13, 3, 2, 16, generator=generator)
    return qkv.requires_grad_(), torch.randn(2, 16, 16, generator=generator).requires_grad_()


def in_dtypes(problem: tuple[Tensor, Tensor], dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return problem[0].detach().to(dtype).requires_grad_(), problem[1].detach().to(bias_dtype).requires_grad_()


@pytest.mark.parametrize("mistake", [*ANY_DTYPE, *SINGLE_PRECISION])
def test_rejects_a_mistake_in_single_precision(mistake: Attend, problem: tuple[Tensor, Tensor]) -> None:
    qkv, bias = problem
    with pytest.raises(CheckFailed, match="over the error budget"):
        assert_within_budget(mistake, "grid", qkv, bias)


@pytest.mark.parametrize("mistake", ANY_DTYPE)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_rejects_a_mistake_in_bf16(mistake: Attend, bias_dtype: torch.dtype, problem: tuple[Tensor, Tensor]) -> None:
    qkv, bias = in_dtypes(problem, torch.bfloat16, bias_dtype)
    with pytest.raises(CheckFailed, match="over the error budget"):
        assert_within_budget(mistake, "block", qkv, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accepts_the_specification(dtype: torch.dtype, problem: tuple[Tensor, Tensor]) -> None:
    qkv, bias = in_dtypes(problem, dtype, dtype)
    assert_within_budget(exact, "grid", qkv, bias)


def test_accepts_attention_weights_rounded_to_the_dtype_of_qkv(problem: tuple[Tensor, Tensor]) -> None:
    """As fused kernels do for the product with the values; their `delta` then comes from the rounded output."""

    def fused(qkv: Tensor, bias: Tensor, problem: Problem) -> Tensor:
        return maxattn.max_sa(qkv, problem.axis, problem.window, bias, backend="sdpa")

    qkv, bias = in_dtypes(problem, torch.bfloat16, torch.bfloat16)
    assert_within_budget(fused, "grid", qkv, bias.detach())


def test_names_what_is_over_and_by_how_much(problem: tuple[Tensor, Tensor]) -> None:
    qkv, bias = problem
    with pytest.raises(CheckFailed, match=r"dbias \(max\): error .*, allowed") as caught:
        assert_within_budget(no_gradient_of_bias, "grid", qkv, bias)
    assert "dq" not in str(caught.value)
