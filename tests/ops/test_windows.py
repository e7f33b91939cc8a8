"""Cutting an image into windows and putting it together again, whatever its size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maxattn.ops import windows
from maxattn.ops.contract import Axis

axes = st.sampled_from(("block", "grid"))
sizes = st.integers(1, 20)
sides = st.integers(1, 9)


def pixel(axis: Axis, size: int, window: int, group: int, token: int) -> int:
    """The definition of the two axes, along one side of the image."""
    groups = -(-size // window)
    return group * window + token if axis == "block" else token * groups + group


@given(axis=axes, size=sizes, window=sides)
def test_spans_cover_each_pixel_exactly_once(axis: Axis, size: int, window: int) -> None:
    pixels = [
        pixel(axis, size, window, group, token)
        for span in windows.spans(size, window, axis)
        for group in range(span.first, span.first + span.groups)
        for token in range(span.tokens)
    ]
    assert sorted(pixels) == list(range(size))


@given(axis=axes, size=sizes, window=sides)
def test_spans_are_at_most_two_of_full_and_of_shorter_groups(axis: Axis, size: int, window: int) -> None:
    spans = windows.spans(size, window, axis)
    assert len(spans) <= (2 if size % window else 1)
    assert all(span.groups >= 1 and 1 <= span.tokens <= window for span in spans)
    assert [span.first for span in spans] == [0, spans[0].groups][: len(spans)]


@given(axis=axes, height=sizes, width=sizes, window=st.tuples(sides, sides), batch=st.integers(0, 2))
def test_windows_are_put_back_where_they_came_from(
    axis: Axis, height: int, width: int, window: tuple[int, int], batch: int
) -> None:
    qkv = torch.arange(batch * height * width * 6).view(batch, height, width, 3, 2, 1)

    def first_of_three(tokens: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        return tokens[:, :, 0]

    out = windows.for_each_size(qkv, None, window, axis, first_of_three)
    assert torch.equal(out, qkv[:, :, :, 0])
    assert out.is_contiguous()


@given(axis=axes, height=sizes, width=sizes, window=st.tuples(sides, sides))
def test_a_window_holds_the_pixels_of_one_group_and_their_part_of_the_bias(
    axis: Axis, height: int, width: int, window: tuple[int, int]
) -> None:
    """The pixels carry their coordinates, the bias its own indices."""
    P_h, P_w = window
    groups_h, groups_w = -(-height // P_h), -(-width // P_w)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    qkv = torch.stack((y, x), -1).reshape(1, height, width, 1, 1, 2).expand(1, height, width, 3, 1, 2)
    bias = torch.arange((P_h * P_w) ** 2).view(1, P_h * P_w, P_h * P_w)

    def attend(tokens: Tensor, corner: Tensor | None) -> Tensor:
        assert corner is not None
        assert corner.shape == (1, tokens.shape[1], tokens.shape[1])
        y, x = tokens[:, :, 0, 0].unbind(-1)
        group_y, token_y = (y // P_h, y % P_h) if axis == "block" else (y % groups_h, y // groups_h)
        group_x, token_x = (x // P_w, x % P_w) if axis == "block" else (x % groups_w, x // groups_w)
        for group in (group_y, group_x):
            assert torch.equal(group, group[:, :1].expand_as(group))
        token = token_y * P_w + token_x
        assert torch.equal(token, token[:1].expand_as(token))
        assert torch.equal(corner[0], bias[0][token[0]][:, token[0]])
        return tokens[:, :, 0]

    windows.for_each_size(qkv, bias, window, axis, attend)


@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize(("size", "calls"), [((8, 12), 1), ((10, 12), 2), ((8, 11), 2), ((10, 11), 4), ((2, 1), 1)])
def test_is_called_once_for_each_size_of_group(axis: Axis, size: tuple[int, int], calls: int) -> None:
    seen = []

    def attend(tokens: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tokens.shape[1])
        return tokens[:, :, 0]

    windows.for_each_size(torch.zeros(1, *size, 3, 1, 1), None, (4, 3), axis, attend)
    assert len(set(seen)) == len(seen) == calls


def test_a_single_part_is_not_copied() -> None:
    part = torch.ones(2, 3)
    assert windows.cat([part], 0) is part


def test_fused_kernels_are_called_for_at_most_65535_windows_at_a_time() -> None:
    seen = []

    def attend(tokens: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tokens.shape[0])
        return tokens[:, :, 2]

    qkv = torch.arange(140_000 * 6.0).view(140_000, 1, 3, 2, 1)
    assert torch.equal(windows.fused(qkv, None, attend), qkv[:, :, 2])
    assert seen == [65_535, 65_535, 8_930]


@pytest.mark.parametrize("bias", [None, torch.ones(1, 4, 4)])
def test_fused_kernels_are_not_called_for_no_windows_and_every_gradient_is_zero(bias: Tensor | None) -> None:
    qkv = torch.empty(0, 4, 3, 1, 8, requires_grad=True)
    inputs = [qkv] if bias is None else [qkv, bias.requires_grad_()]

    def attend(tokens: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("it is called")

    out = windows.fused(qkv, bias, attend)
    assert out.shape == (0, 4, 1, 8)
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_fused_kernels_are_given_tensors_and_gradients_on_16_bytes(dtype: torch.dtype, offset: int) -> None:
    seen = []

    def attend(tokens: Tensor, bias: Tensor | None) -> Tensor:
        values = tokens[:, :, 2] * 1
        values.register_hook(seen.append)
        seen.append(tokens)
        return values.view_as(values)

    def elsewhere(*shape: int) -> Tensor:
        """Numbers that start `offset` elements after an address that is aligned."""
        memory = torch.arange(offset + torch.Size(shape).numel(), dtype=dtype)
        return memory[offset:].view(shape)

    qkv, gradient = elsewhere(2, 4, 3, 1, 8).requires_grad_(), elsewhere(2, 4, 1, 8)
    for of_out in (gradient, gradient[:1, :1, :1, :1].expand(2, 4, 1, 8)):
        (dqkv,) = torch.autograd.grad(windows.fused(qkv, None, attend), qkv, of_out)
        assert torch.equal(dqkv[:, :, 2], of_out)
    assert len(seen) == 4
    for tensor in seen:
        assert tensor.stride(-1) == 1
        assert all(step * dtype.itemsize % 16 == 0 for step in (tensor.storage_offset(), *tensor.stride()[:-1]))


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
def test_a_positive_scale_gives_the_same_logits(scale: float) -> None:
    qkv = torch.randn(2, 5, 3, 1, 8, dtype=torch.bfloat16)
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    other, positive = windows.positive_scale(qkv, scale)
    other_q, other_k, other_v = other.double().permute(2, 0, 3, 1, 4)
    assert positive > 0
    assert torch.equal(positive * (other_q @ other_k.mT), scale * (q @ k.mT))
    assert torch.equal(other_v, v)
