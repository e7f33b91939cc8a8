"""What of compiled training on a GPU can be seen without one: its operators are traced for any number of images."""

from __future__ import annotations

import pytest
import torch
from fresh_python import python
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


def test_the_kernels_are_not_imported() -> None:
    code = """
import sys, torch, maxattn
torch.compile(maxattn.build("nano"), backend="eager")(torch.ones(2, 3, 28, 28)).sum().backward()
assert "maxattn.nn.gpu" in sys.modules
kernels = {f"maxattn.nn.gpu.{name}" for name in ("batch_norm", "depthwise", "squeeze", "tokens")}
assert not kernels & set(sys.modules)
"""
    python(arguments=("-c", code))


def test_eager_training_takes_no_compiler() -> None:
    code = """
import sys, torch, maxattn
maxattn.build("nano")(torch.ones(2, 3, 28, 28)).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    python(arguments=("-c", code))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_number_of_images_that_is_not_known_stays_so(stride: int) -> None:
    """Forward and backward, each by itself: without CUDA, PyTorch has no autograd for its devices."""
    from maxattn.nn.gpu import batch_norm, depthwise, squeeze, tokens

    shapes = ShapeEnv()
    symbol = shapes.create_symbol(4, source=ConstantSource("images"), dynamic_dim=DimDynamic.DYNAMIC)
    batch = shapes.create_symintnode(symbol, hint=4)
    with FakeTensorMode(shape_env=shapes), torch.device("cuda:0"), torch.no_grad():
        x = torch.empty(batch, 9, 7, 8, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        weight, bias = torch.empty(8), torch.empty(8)
        taps = torch.empty(3, 3, 8).permute(2, 0, 1).unsqueeze(1)
        mean, var, rstd, scale = batch_norm.moments(x, weight, 1e-3)
        y = batch_norm.batch_norm_act(x, mean, rstd, scale, weight, bias, "gelu_tanh")
        out = depthwise.convolve(y, taps, stride, ((1, 1), (1, 1)))
        dy, dtaps = depthwise.depthwise_backward(out, y, taps, stride, 1, 1, True, True)
        dx, dweight, dbias = batch_norm.batch_norm_act_backward(dy, x, mean, rstd, scale, bias, "gelu_tanh")
        down, up, matrix = (torch.empty(*size, dtype=x.dtype) for size in ((4, 8), (8, 4), (6, 8)))
        offset = torch.empty(6, dtype=x.dtype)
        gates = (down, torch.empty(4, dtype=x.dtype), up, torch.empty(8, dtype=x.dtype), matrix, offset)
        norm = (mean, rstd, scale, weight, bias, "gelu_tanh")
        projected, *kept = squeeze.squeeze_excite_conv(x, *norm, *gates)
        of_squeeze = squeeze.squeeze_excite_conv_backward(
            projected, x, mean, rstd, scale, bias, "gelu_tanh", down, up, matrix, *kept
        )
        rows = x.permute(0, 2, 3, 1)
        again, hidden = tokens.layer_norm_linear(rows, weight, bias, 1e-5, matrix, None)
        of_norm = tokens.layer_norm_linear_backward(again, hidden, rows, weight, bias, 1e-5, matrix)
        fed = tokens.activation_linear(rows, bias, "gelu_tanh", matrix, offset)
        of_activation = tokens.activation_linear_backward(fed, rows, bias, "gelu_tanh", matrix)
    assert [tuple(one.shape[1:]) for one in (projected, hidden, fed)] == [(6, 9, 7), (9, 7, 6), (9, 7, 6)]
    for like_rows in (of_squeeze[0].permute(0, 2, 3, 1), of_norm[0], of_activation[0], again):
        assert like_rows.is_contiguous()
        assert tuple(like_rows.shape[1:]) == (9, 7, 8)
        assert like_rows.shape[0].node.expr == symbol
    assert {tuple(one.shape) for one in (mean, var, rstd, scale, dweight, dbias)} == {(8,)}
    assert dtaps.shape == taps.shape
    assert tuple(out.shape[1:]) == ((8, 9, 7) if stride == 1 else (8, 5, 4))
    for images in (y, out, dy, dx):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.device.type, images.dtype) == ("cuda", torch.bfloat16)
        assert images.shape[0].node.expr == symbol
    assert not shapes.replacements
