"""What the conformance kit does not ask: the operators' registration, and the paths by size of window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nearness import assert_near
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import maxattn
from maxattn.ops.contract import Axis, Problem
from maxattn.ops.registry import registered
from maxattn_triton import Triton, configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def backend() -> Iterator[Triton]:
    with registered(Triton()) as backend:
        yield backend


def inputs(
    B: int, H: int, W: int, heads: int, head_dim: int, tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, H, W, 3, heads, head_dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(heads, tokens, tokens, generator=generator).to(DEVICE).requires_grad_()
    return qkv, bias


def results(qkv: Tensor, bias: Tensor, axis: Axis, window: int | tuple[int, int], backend: str) -> list[Tensor]:
    out = maxattn.max_sa(qkv, axis, window, bias, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (qkv, bias), torch.ones_like(out).cumsum(1) / out.shape[1])]


def assert_near_naive(qkv: Tensor, bias: Tensor, axis: Axis, window: tuple[int, int]) -> None:
    wide = qkv.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    exact, naive = results(*wide, axis, window, "naive"), results(qkv, bias, axis, window, "naive")
    for actual, same, reference in zip(results(qkv, bias, axis, window, "triton"), naive, exact, strict=True):
        assert_near(actual, same, reference, qkv.dtype)


@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize(
    ("size", "window", "dtype"),
    [
        pytest.param((1, 10, 13, 2, 16), (7, 7), torch.float16, id="whole windows, ragged"),
        pytest.param((2, 6, 10, 1, 48), (3, 5), torch.bfloat16, id="whole windows, head dim 48, rectangular"),
        pytest.param((1, 12, 24, 1, 32), (12, 12), torch.float16, id="rows of 144 = 128 + 16 keys"),
        pytest.param((1, 13, 11, 1, 32), (12, 10), torch.bfloat16, id="rows, ragged"),
        pytest.param((1, 18, 20, 1, 16), (18, 18), torch.float16, id="tiles, ragged"),
        pytest.param((3, 17, 17, 1, 16), (17, 17), torch.float16, id="tiles of three windows, two side by side"),
        pytest.param((1, 14, 14, 1, 20), (7, 7), torch.float32, id="tiles for fp32"),
    ],
)
def test_each_family_of_kernels_equals_naive(
    size: tuple[int, int, int, int, int], window: tuple[int, int], dtype: torch.dtype, axis: Axis
) -> None:
    qkv, bias = inputs(*size, window[0] * window[1], dtype)
    assert_near_naive(qkv, bias, axis, window)


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 2, 1)], ids=["heads last", "keys before queries"])
@pytest.mark.parametrize(
    ("window", "dtype"), [((8, 16), torch.float32), ((16, 24), torch.float16)], ids=["128 tokens", "384 tokens"]
)
def test_a_bias_in_any_layout_where_rows_need_no_padding(
    window: tuple[int, int], dtype: torch.dtype, order: tuple[int, int, int]
) -> None:
    qkv, bias = inputs(1, *window, 2, 16, window[0] * window[1], dtype)
    laid = torch.empty([bias.shape[side] for side in order]).to(bias.device)
    back = laid.permute([order.index(side) for side in range(3)]).copy_(bias.detach()).requires_grad_()
    assert not back.is_contiguous()
    assert_near_naive(qkv, back, "block", window)


@pytest.mark.parametrize(
    ("window", "dtype"), [(3, torch.float16), (9, torch.float16), (3, torch.float32)], ids=["whole", "rows", "tiles"]
)
def test_parts_of_qkv_may_be_farther_apart_than_32_bits_count_twice(window: int, dtype: torch.dtype) -> None:
    packed, bias = inputs(1, window, window, 1, 16, window**2, dtype)
    apart = 2**30 + 64
    far = torch.empty(2 * apart + packed.numel(), dtype=dtype, device=DEVICE).as_strided(
        packed.shape, (*packed.stride()[:3], apart, *packed.stride()[4:])
    )
    far = far.copy_(packed.detach()).requires_grad_()
    here, there = (results(qkv, bias, "block", window, "triton") for qkv in (packed, far))
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("window", "dtype"), [(12, torch.float16), (17, torch.float16), (9, torch.float32)], ids=["rows", "tiles", "fp32"]
)
def test_a_bias_may_hide_all_keys_but_some_of_the_last_tile(window: int, dtype: torch.dtype) -> None:
    qkv, bias = inputs(1, window, window, 1, 16, window**2, dtype)
    hidden = bias.detach().clone()
    hidden[:, :, :-10] = -torch.inf
    assert_near_naive(qkv, hidden.requires_grad_(), "block", (window, window))


@pytest.mark.parametrize(
    ("tokens", "forward", "backward"), [(49, "rows", "whole"), (144, "rows", "rows"), (784, "tiles", "tiles")]
)
def test_small_windows_are_one_tile_and_large_ones_many(tokens: int, forward: str, backward: str) -> None:
    assert configs.forward_kernel(tokens, 32, 2) == forward
    assert configs.backward_kernel(tokens, 32, 2) == backward


def test_the_bias_gradient_is_the_same_bit_by_bit_in_every_run() -> None:
    qkv, bias = inputs(3, 14, 14, 2, 16, 49, torch.float16)
    first, second = (results(qkv, bias, "grid", 7, "triton")[2] for _ in range(2))
    assert torch.equal(first, second)


def test_a_slice_in_place_equals_its_copy() -> None:
    qkv, bias = inputs(2, 16, 20, 3, 24, 16, torch.float16)
    part = qkv[:, 3:11, 5:17, :, 1:2, 4:20]
    with torch.no_grad():
        strided = maxattn.max_sa(part, "block", 4, bias[:1], backend="triton")
        packed = maxattn.max_sa(part.contiguous(), "block", 4, bias[:1], backend="triton")
    assert torch.equal(strided, packed)


def test_nothing_is_saved_without_a_gradient() -> None:
    from maxattn_triton import ops

    qkv, bias = inputs(1, 7, 7, 1, 16, 49, torch.float16)
    assert ops.forward(qkv.detach(), bias.detach(), None, False, 7, 7, 0.25, 0.0, False)[1].numel() == 0


def test_compiles_without_a_graph_break_for_any_batch() -> None:
    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return maxattn.max_sa(qkv, "grid", 2, bias, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    for batch in (2, 3, 4):
        qkv, bias = inputs(batch, 4, 4, 1, 16, 4)
        torch.testing.assert_close(compiled(qkv, bias), attend(qkv, bias))


def test_flops_are_those_of_the_pairs_of_tokens_that_exist() -> None:
    qkv, bias = inputs(1, 5, 4, 2, 16, 16)
    maxattn.max_sa(qkv, "block", 4, bias, backend="triton")  # a counter knows what was there when it was made
    with FlopCounterMode(display=False) as counter:
        maxattn.max_sa(qkv, "block", 4, bias, backend="triton").sum().backward()
    pairs = 16 * 16 + 4 * 4
    assert counter.get_total_flops() == (2 + 5) * 2 * pairs * 2 * 16


def test_importing_the_plugin_does_not_import_triton() -> None:
    program = "import sys, maxattn_triton; assert not {'triton', 'maxattn_triton.ops'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


@pytest.mark.parametrize("variable", [None, "1"])
def test_is_never_chosen_by_itself_on_a_cpu(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRITON_INTERPRET", variable)
    problem = Problem(axis="block", window=(7, 7), batch=1, height=14, width=14, heads=1, head_dim=32)
    explanation = maxattn.explain(problem)
    assert explanation.backend == "sdpa"
    codes = {one.name: [reason.code for reason in one.reasons] for one in explanation.candidates}
    assert codes["triton"] == ([] if variable else ["interpreter"])


def test_to_a_compiler_each_kernel_writes_its_results_alone() -> None:
    script = Path(__file__).with_name("what_kernels_write.py")
    compiled = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], env=compiled, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "rows.forward": ["lse", "out"],
        "rows.backward": ["dbias", "delta", "dqkv"],
        "columns.backward": ["dqkv"],
        "whole.backward": ["dbias", "dqkv"],
        "tiles.forward": ["lse", "out"],
        "tiles.backward_queries": ["delta", "dqkv"],
        "tiles.backward_keys": ["dqkv"],
        "tiles.backward_bias": ["dbias"],
    }
