"""`naive` is the specification: it equals the definition written as loops, and timm's partitions where sizes divide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peers import timm
from torch import Tensor

import maxattn
from maxattn.ops.contract import Axis


def literal(
    qkv: np.ndarray, axis: Axis, window: tuple[int, int], bias: np.ndarray | None, scale: float | None
) -> np.ndarray:
    """The definition of the operator, one query at a time.

    With `n = ceil(H / P_h)`, and the same for the width, token (i, j) of group (a, b) is pixel
    `(a * P_h + i, b * P_w + j)` of the block axis and `(i * n_h + a, j * n_w + b)` of the grid axis. A pixel outside
    H x W does not exist.
    """
    B, H, W, _, heads, head_dim = qkv.shape
    P_h, P_w = window
    n_h, n_w = math.ceil(H / P_h), math.ceil(W / P_w)
    scale = head_dim**-0.5 if scale is None else scale
    out = np.full((B, H, W, heads, head_dim), np.nan)
    for image, head, a, b in np.ndindex(B, heads, n_h, n_w):
        group = []
        for i, j in np.ndindex(P_h, P_w):
            y, x = (a * P_h + i, b * P_w + j) if axis == "block" else (i * n_h + a, j * n_w + b)
            if y < H and x < W:
                group.append((i * P_w + j, y, x))
        for query, query_y, query_x in group:
            q = qkv[image, query_y, query_x, 0, head]
            logits = []
            for key, y, x in group:
                logit = scale * float(q @ qkv[image, y, x, 1, head])
                logits.append(logit if bias is None else logit + bias[head, query, key])
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            values = np.stack([qkv[image, y, x, 2, head] for _, y, x in group])
            out[image, query_y, query_x, head] = weights @ values
    return out


@given(
    axis=st.sampled_from(("block", "grid")),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)),
    heads=st.integers(1, 2),
    head_dim=st.integers(1, 4),
    scale=st.sampled_from((None, 0.7)),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_the_definition_written_as_loops(
    axis: Axis,
    window: tuple[int, int],
    size: tuple[int, int, int],
    heads: int,
    head_dim: int,
    scale: float | None,
    with_bias: bool,
    seed: int,
) -> None:
    generator, tokens = np.random.default_rng(seed), window[0] * window[1]
    qkv = generator.standard_normal((*size, 3, heads, head_dim))
    bias = generator.standard_normal((heads, tokens, tokens)) if with_bias else None
    out = maxattn.max_sa(
        torch.from_numpy(qkv), axis, window, None if bias is None else torch.from_numpy(bias), scale, backend="naive"
    )
    np.testing.assert_allclose(out.numpy(), literal(qkv, axis, window, bias, scale), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("axis", ["block", "grid"])
def test_equals_attention_in_the_partitions_of_timm(axis: Axis) -> None:
    window, (B, H, W, heads, head_dim) = (3, 4), (2, 9, 16, 2, 5)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, H, W, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(heads, 12, 12, generator=generator, dtype=torch.float64)
    maxxvit = timm.models.maxxvit
    if axis == "block":
        partition, reverse = maxxvit.window_partition, maxxvit.window_reverse
    else:
        partition, reverse = maxxvit.grid_partition, maxxvit.grid_reverse

    windows = partition(qkv.flatten(3), list(window)).reshape(-1, 12, 3, heads, head_dim)
    q, k, v = windows.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * head_dim**-0.5 + bias).softmax(-1)
    attended = (weights @ v).transpose(1, 2).reshape(-1, *window, heads * head_dim)
    expected = reverse(attended, list(window), [H, W]).unflatten(-1, (heads, head_dim))

    out = maxattn.max_sa(qkv, axis, window, bias, backend="naive")
    torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-13)


def small_problem(with_bias: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 3, 4, 3, 1, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return qkv, bias if with_bias else None


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("axis", ["block", "grid"])
def test_gradients_are_those_of_finite_differences(axis: Axis, with_bias: bool) -> None:
    def attend(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return maxattn.max_sa(qkv, axis, (2, 3), bias, backend="naive")

    inputs = tuple(x for x in small_problem(with_bias) if x is not None)
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_and_sums_run_in_single_precision(dtype: torch.dtype) -> None:
    """Only the inputs and the output are rounded: in between it is the fp32 result, bit by bit."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 7, 9, 3, 2, 16, generator=generator).to(dtype)
    bias = torch.randn(2, 16, 16, generator=generator).to(dtype)
    out = maxattn.max_sa(qkv, "grid", 4, bias, backend="naive")
    in_single = maxattn.max_sa(qkv.float(), "grid", 4, bias.float(), backend="naive")
    assert torch.equal(out, in_single.to(dtype))


def test_large_logits_do_not_overflow() -> None:
    qkv = torch.full((1, 4, 4, 3, 1, 8), 100.0, dtype=torch.float16)
    out = maxattn.max_sa(qkv, "block", 4, backend="naive")
    assert torch.equal(out, qkv[:, :, :, 2])


def dropped_weights(backend: str, dropout_p: float) -> Tensor:
    """The attention weights after dropout `(windows, heads, N, N)`: the output where the values are unit vectors."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, 16, 16, 3, 2, 16, generator=generator, dtype=torch.float64)
    qkv[:, :, :, 2] = torch.eye(16, dtype=torch.float64).reshape(4, 4, 1, 16).repeat(4, 4, 1, 1)
    out = maxattn.max_sa(qkv, "block", 4, dropout_p=dropout_p, backend=backend)
    return out.unflatten(2, (4, 4)).unflatten(1, (4, 4)).permute(0, 1, 3, 5, 2, 4, 6).reshape(64, 2, 16, 16)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_drops_weights_at_its_rate_and_scales_the_others_up(backend: str, dropout_p: float) -> None:
    torch.manual_seed(0)
    weights = dropped_weights(backend, 0.0)
    assert weights.min() > 0
    dropped = dropped_weights(backend, dropout_p)
    kept = dropped != 0
    torch.testing.assert_close(dropped, weights * kept / (1 - dropout_p), rtol=1e-12, atol=0.0)
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    assert abs(1 - kept.double().mean().item() - dropout_p) < 4 * deviation


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_dropout_differs_between_windows_heads_and_calls_but_not_for_one_seed(backend: str) -> None:
    torch.manual_seed(0)
    first, second = dropped_weights(backend, 0.5) != 0, dropped_weights(backend, 0.5) != 0
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[:, 0], first[:, 1])
    torch.manual_seed(0)
    assert torch.equal(dropped_weights(backend, 0.5) != 0, first)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("axis", ["block", "grid"])
def test_gradient_drops_the_same_weights_as_the_output(backend: str, axis: Axis) -> None:
    """The output is linear in v, `out = M v`, so `<g, out> = <M^T g, v>`: true for one and the same M only."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    out = maxattn.max_sa(qkv, axis, 4, dropout_p=0.5, backend=backend)
    g = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, g)
    torch.testing.assert_close((g * out).sum(), (gradient[:, :, :, 2] * qkv[:, :, :, 2]).sum())
    without = maxattn.max_sa(qkv, axis, 4, backend=backend)
    assert not torch.allclose((g * without).sum(), (gradient[:, :, :, 2] * qkv[:, :, :, 2]).sum())


def test_gathers_no_pixel_twice() -> None:
    """A value that only one pixel has reaches the pixels of its window and no other, on either axis."""
    for axis, neighbours in (("block", [(0, 0), (0, 1), (1, 0), (1, 1)]), ("grid", [(0, 0), (0, 2), (2, 0), (2, 2)])):
        qkv = torch.zeros(1, 4, 4, 3, 1, 1)
        qkv[0, 0, 0, 2] = 1.0
        out = maxattn.max_sa(qkv, axis, 2, backend="naive")
        expected = F.one_hot(torch.tensor([4 * y + x for y, x in neighbours]), 16).sum(0).reshape(4, 4) / 4
        assert torch.equal(out[0, :, :, 0, 0], expected)
