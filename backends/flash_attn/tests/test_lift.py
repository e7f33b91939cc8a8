"""The lift, proved with PyTorch's attention without a mask where flash-attn would be called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from adapters import names_of_checks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import maxattn
from maxattn.ops.contract import Axis, Problem
from maxattn.ops.registry import registered
from maxattn.testing import check_backend
from maxattn.testing.budget import collect, shares, told_over
from maxattn.testing.case import Case, Inputs
from maxattn_flash_attn import FlashAttn, generations
from maxattn_flash_attn.backend import CAPABILITIES
from maxattn_flash_attn.generations import TWO, Generation
from maxattn_flash_attn.lift import lift

LEFT_OUT = frozenset(["far_apart", "generated", "operators"])
"""Checks that take gigabytes, or a minute of a C++ compiler; and of own operators, of which there are none."""


class StandIn(FlashAttn):
    """PyTorch's attention in place of flash-attn 2; what flash-attn refuses fails."""

    name = "stand_in"

    def generations(self, problem: Problem) -> list[Generation]:
        return [TWO]

    def flash(self, qkv: Tensor, scale: float, generation: Generation, problem: Problem) -> Tensor:
        assert qkv.shape[-1] % 8 == 0
        assert qkv.shape[-1] <= 256
        assert 0 < qkv.shape[0] <= 65_535
        assert scale > 0
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=problem.dropout_p, scale=scale).transpose(1, 2)


class OnCpu(StandIn):
    """In every dtype: fp64 proves the formula, the others its rounding."""

    capabilities = replace(
        CAPABILITIES,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    )


@pytest.mark.parametrize("name", names_of_checks(OnCpu(), "cpu", LEFT_OUT))
def test_conforms(name: str) -> None:
    (outcome,) = check_backend(OnCpu(), examples=10, only=[name]).checks
    assert outcome.status == "passed", str(outcome)


@pytest.mark.parametrize("size", [(3, 14, 14), (2, 13, 9)])
@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize(("window", "terms", "times"), [((7, 7), "two terms", 100), ((12, 11), "one term", 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_bias_in_two_terms_may_be_of_any_size_and_one_in_one_term_of_the_logits(
    size: tuple[int, int, int], axis: Axis, window: tuple[int, int], terms: str, times: float, dtype: torch.dtype
) -> None:
    batch, height, width = size
    problem = Problem(
        axis=axis,
        window=window,
        batch=batch,
        height=height,
        width=width,
        heads=2,
        head_dim=32,
        dtype=dtype,
        bias=torch.float32,
        requires_grad=True,
        bias_requires_grad=True,
    )
    assert terms in OnCpu().kernel(problem)
    given = Case(problem=problem).tensors()
    assert given.bias is not None
    inputs = Inputs(given.qkv, (given.bias.detach() * times).requires_grad_(), given.grad_out)
    results = collect(OnCpu().attend(inputs.qkv, inputs.bias, problem), inputs.leaves, inputs.grad_out)
    assert told_over(shares(results, inputs, problem)) == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_of_minus_infinity_hides_keys(dtype: torch.dtype) -> None:
    qkv, bias = torch.randn(1, 4, 4, 3, 1, 32, dtype=dtype), torch.zeros(1, 16, 16)
    bias[:, :, 8:] = -torch.inf
    others = qkv.clone()
    others[:, 2:, :, 1:] = 7
    with registered(OnCpu()):
        out, of_others = (maxattn.max_sa(x, "block", 4, bias, backend="stand_in") for x in (qkv, others))
    assert torch.equal(out, of_others)
    assert out.isfinite().all()


@pytest.mark.parametrize("scale", [2**-4, 0.3, 32**-0.5, 7.0])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 22), (torch.bfloat16, 16)])
def test_two_terms_have_twice_the_bits_of_one_for_any_scale(dtype: torch.dtype, bits: int, scale: float) -> None:
    bias = torch.tensor([1.0, 3 + 2**-8, -40_000.0, 1 / 3]).view(1, 2, 2)
    q, k, v = lift(torch.zeros(3, 2, 3, 1, 8, dtype=dtype), bias, scale, head_dim=16, terms=2).permute(2, 0, 3, 1, 4)
    error = scale * q.double() @ k.double().mT - bias
    assert (error.abs() <= 2.0**-bits * bias.abs()).all()
    assert not v.any()


def test_each_size_of_group_takes_no_more_channels_than_it_needs() -> None:
    widths = []

    class Watched(OnCpu):
        def flash(self, qkv: Tensor, scale: float, generation: Generation, problem: Problem) -> Tensor:
            widths.append(qkv.shape[-1])
            return super().flash(qkv, scale, generation, problem)

    with registered(Watched()):
        for bias in (None, torch.zeros(1, 9, 9)):
            maxattn.max_sa(torch.randn(1, 5, 5, 3, 1, 16), "grid", 3, bias, backend="stand_in")
    assert widths == [16] * 4 + [40, 32, 32, 24]  # 16 + 2 * 9, 16 + 2 * 6 twice and 16 + 2 * 4, in eights


if torch.cuda.is_available():

    class OnCuda(StandIn):
        """PyTorch's own build of flash-attn 2, and nothing else."""

        capabilities = replace(CAPABILITIES, compute_capability=((8, 0), None))

        def flash(self, qkv: Tensor, scale: float, generation: Generation, problem: Problem) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return super().flash(qkv, scale, generation, problem)

    @pytest.mark.parametrize("name", names_of_checks(OnCuda(), "cuda", LEFT_OUT))
    def test_conforms_by_pytorchs_flash_attention(name: str) -> None:
        (outcome,) = check_backend(OnCuda(), device="cuda", examples=50, only=[name]).checks
        assert outcome.status != "failed", str(outcome)

    if generations.installed():

        @pytest.mark.filterwarnings("ignore::UserWarning")  # what flash-attn 4 warns of, as it compiles
        @pytest.mark.parametrize("name", names_of_checks(FlashAttn(), "cuda", LEFT_OUT))
        def test_conforms_by_the_installed_flash_attn(name: str) -> None:
            (outcome,) = check_backend(FlashAttn(), device="cuda", examples=50, only=[name]).checks
            assert outcome.status != "failed", str(outcome)
