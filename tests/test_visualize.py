"""Attention maps are the weights of the softmax, whichever backend computes them; and pictures are written whole."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

import maxattn
from maxattn.nn import MaxAttention
from maxattn.visualize import Attended, attended, attention_map, draw_attention, draw_predictions, rollout

Axis = Literal["block", "grid"]
SIZES = [(8, 8), (9, 6), (5, 11)]


def attend(axis: Axis, size: tuple[int, int], **settings: Any) -> tuple[MaxAttention, Tensor]:
    """A module with large weights, so that its attention is far from uniform, and an input."""
    torch.manual_seed(0)
    module = MaxAttention(12, axis, (4, 3), head_dim=4, **settings).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module, torch.randn(1, *size, 12, dtype=torch.float64)


def group_and_token(axis: Axis, size: tuple[int, int], pixel: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Straight from the definition: the group of a pixel, and its place in there."""
    pairs = []
    for place, side, window in zip(pixel, size, (4, 3), strict=True):
        groups = -(-side // window)
        pairs.append((place // window, place % window) if axis == "block" else (place % groups, place // groups))
    (a, i), (b, j) = pairs
    return (a, b), i * 3 + j


def by_hand(module: MaxAttention, x: Tensor, pixel: tuple[int, int]) -> Tensor:
    """The softmax over the pixels of the group, one at a time."""
    size = (x.shape[1], x.shape[2])
    q, k, _ = module.qkv(x)[0].unflatten(-1, (3, module.heads, -1)).unbind(2)
    bias = torch.zeros(module.heads, 12, 12) if module.rel_pos is None else module.rel_pos()
    group, token = group_and_token(module.axis, size, pixel)
    logits = torch.full((module.heads, *size), float("-inf"), dtype=x.dtype)
    for other in product(range(size[0]), range(size[1])):
        its_group, its_token = group_and_token(module.axis, size, other)
        if its_group == group:
            logits[:, *other] = (q[pixel] * k[other]).sum(-1) * module.scale + bias[:, token, its_token]
    return logits.flatten(1).softmax(-1).view_as(logits).detach()


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize("rel_pos", ["table", "none"])
def test_a_map_is_the_softmax_over_the_pixels_of_the_group(
    axis: Axis, size: tuple[int, int], rel_pos: str, backend: str
) -> None:
    module, x = attend(axis, size, rel_pos=rel_pos)
    for pixel in [(0, 0), (4, 3), (size[0] - 1, size[1] - 1)]:
        with maxattn.use_backend(backend):
            weights = attention_map(module, x, pixel)
        torch.testing.assert_close(weights, by_hand(module, x, pixel))


@pytest.mark.parametrize("backend", maxattn.list_backends())
@pytest.mark.parametrize("axis", ["block", "grid"])
def test_weights_sum_to_one_within_the_group_and_are_zero_outside(axis: Axis, backend: str) -> None:
    module, x = attend(axis, (9, 7))
    with maxattn.use_backend(backend):
        weights = attention_map(module, x, (6, 2))
    group, _ = group_and_token(axis, (9, 7), (6, 2))
    members = torch.tensor(
        [[group_and_token(axis, (9, 7), (row, column))[0] == group for column in range(7)] for row in range(9)]
    )
    assert weights.shape == (3, 9, 7)
    assert (weights[:, members] > 0).all()
    assert (weights[:, ~members] == 0).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_a_rollout_is_a_row_of_the_product_of_the_attention_matrices(size: tuple[int, int]) -> None:
    layers = [Attended(*attend(axis, size)) for axis in ("block", "grid")]
    pixels = list(product(range(size[0]), range(size[1])))
    block, grid = (torch.stack([by_hand(*layer, pixel).mean(0).flatten() for pixel in pixels]) for layer in layers)
    for index in (0, len(pixels) // 2, len(pixels) - 1):
        torch.testing.assert_close(rollout(layers, pixels[index]).flatten(), (grid @ block)[index])


def test_a_rollout_through_one_layer_is_its_map() -> None:
    module, x = attend("grid", (8, 8))
    torch.testing.assert_close(rollout([Attended(module, x)], (1, 2)), attention_map(module, x, (1, 2)).mean(0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_looking_leaves_no_trace_and_works_without_gradients(mode: Any) -> None:
    module, x = attend("block", (8, 8), attn_drop=0.5)
    expected = attention_map(module, x, (3, 3))
    with mode():
        assert attention_map(module, x * 1, (3, 3)).equal(expected)
        assert rollout([Attended(module, x * 1)], (3, 3)).equal(expected.mean(0))
    assert not expected.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


def test_attention_is_looked_at_where_the_network_has_it() -> None:
    model = maxattn.build("nano").eval()
    x = torch.randn(1, 3, 28, 36)
    layers = attended(model, x)
    assert [layer.attention for layer in layers] == list(model.attentions())
    assert [layer.attention.axis for layer in layers] == ["block", "grid", "block", "grid"]
    assert [tuple(layer.x.shape[1:]) for layer in layers] == [(14, 18, 24), (14, 18, 24), (7, 9, 48), (7, 9, 48)]
    assert not any(attention._forward_pre_hooks for attention in model.attentions())


def test_what_cannot_be_drawn_is_an_error() -> None:
    module, x = attend("block", (8, 8))
    with pytest.raises(ValueError, match=r"pixel \(8, 0\) lies outside the 8 x 8 image"):
        attention_map(module, x, (8, 0))
    with pytest.raises(ValueError, match=r"of one image, not of 2: pass x\[i : i \+ 1\]"):
        attention_map(module, x.expand(2, -1, -1, -1), (0, 0))
    with pytest.raises(ValueError, match="a rollout needs at least one layer"):
        rollout([], (0, 0))


def colors(path: Path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(image.convert("RGB").getcolors(maxcolors=2**24) or [])


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pictures_are_pngs_with_something_in_them(tmp_path: Path, in_chans: int) -> None:
    model = maxattn.build("nano", in_chans=in_chans).eval()
    images = torch.randint(0, 256, (3, in_chans, 28, 28), dtype=torch.uint8)
    draw_attention(tmp_path / "attention.png", model, images / 255, images, [(0, 0), (5, 7), (13, 13)])
    probabilities = torch.randn(3, 10).softmax(-1)
    draw_predictions(tmp_path / "predictions.png", images, probabilities, torch.tensor([1, 2, 3]), "0123456789")
    assert colors(tmp_path / "attention.png") > 100
    assert colors(tmp_path / "predictions.png") > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "predictions.png"]


def test_a_picture_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model, images = maxattn.build("nano").eval(), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    with pytest.raises(ValueError, match="lies outside the 14 x 14 image"):
        draw_attention(tmp_path / "attention.png", model, images / 255, images, [(14, 0)])
    with pytest.raises(ValueError, match="first block has no Max-SA"):
        draw_attention(tmp_path / "a.png", maxattn.build("nano", **{"stages.0.layers": ["mbconv"]}), images, images, [])
    with pytest.raises(FileNotFoundError):
        draw_attention(tmp_path / "missing/attention.png", model, images / 255, images, [(0, 0)])
    assert list(tmp_path.iterdir()) == []
