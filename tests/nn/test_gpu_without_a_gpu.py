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
assert not {"maxattn.nn.gpu.ops", "maxattn.nn.gpu.kernels", "maxattn.nn.gpu.depthwise"} & set(sys.modules)
"""
    python(arguments=("-c", code))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_number_of_images_that_is_not_known_stays_so(stride: int) -> None:
    """Forward and backward, each by itself: without CUDA, PyTorch has no autograd for its devices."""
    from maxattn.nn.gpu import depthwise, ops

    shapes = ShapeEnv()
    symbol = shapes.create_symbol(4, source=ConstantSource("images"), dynamic_dim=DimDynamic.DYNAMIC)
    batch = shapes.create_symintnode(symbol, hint=4)
    with FakeTensorMode(shape_env=shapes), torch.device("cuda:0"), torch.no_grad():
        x = torch.empty(batch, 9, 7, 8, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        weight, bias = torch.empty(8), torch.empty(8)
        taps = torch.empty(3, 3, 8).permute(2, 0, 1).unsqueeze(1)
        mean, var, rstd, scale = ops.moments(x, weight, 1e-3)
        y = ops.batch_norm_act(x, mean, rstd, scale, weight, bias, "gelu_tanh")
        out = depthwise.convolve(y, taps, stride, ((1, 1), (1, 1)))
        dy, dtaps = depthwise.depthwise_backward(out, y, taps, stride, 1, 1, True, True)
        dx, dweight, dbias = ops.batch_norm_act_backward(dy, x, mean, rstd, scale, bias, "gelu_tanh")
    assert {tuple(one.shape) for one in (mean, var, rstd, scale, dweight, dbias)} == {(8,)}
    assert dtaps.shape == taps.shape
    assert tuple(out.shape[1:]) == ((8, 9, 7) if stride == 1 else (8, 5, 4))
    for images in (y, out, dy, dx):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.device.type, images.dtype) == ("cuda", torch.bfloat16)
        assert images.shape[0].node.expr == symbol
    assert not shapes.replacements
