"""Batch norm, activation, squeeze-excitation and a 1x1 convolution as one operator, of which little is kept.

The operators are `maxattn_nn::squeeze_excite_conv` and its `_backward`; what a compiler makes of them is told in
`batch_norm`. Importing this imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maxattn.nn.gpu import batch_norm as norms
from maxattn.nn.gpu import batch_norm_kernels as kernels
from maxattn.nn.gpu.launching import CHANNELS, COMPILED, asked, blocks_of, launch, operator
from maxattn.ops.devices import on_device_of

ROWS = 32
"""Of a tile."""


@operator("maxattn_nn::squeeze_excite_conv", mutates_args=())  # type: ignore[untyped-decorator]
def squeeze_excite_conv(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    matrix: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv(a * gate)`, a the activation of the norm of channels-last `x (B, C, H, W)` as in `batch_norm_act`.

    `gate = sigmoid(up(silu(down(a.mean((2, 3))))))`, with `down (S, C)` and `up (C, S)`; `matrix (N, C)` is the
    convolution's. Beside the output `(B, N, H, W)`, channels-last: the mean `(B, C)`, what `down` makes of it
    `(B, S)`, and the gate, without gradients.
    """
    (B, C, H, W), rows = x.shape, x.permute(0, 2, 3, 1)  # NHWC from here, or a compiler would have to turn the result
    a = norms.ACTIVATIONS[act]((rows.float() - mean) * scale + bias).to(x.dtype).view(B, H * W, C)
    pooled = a.mean(1, dtype=torch.float32).to(x.dtype)
    hidden = F.linear(pooled, down, down_bias)
    gate = F.linear(F.silu(hidden), up, up_bias).sigmoid()
    out = F.linear(a * gate.view(B, 1, C), matrix, offset)
    return out.view(B, H, W, -1).permute(0, 3, 1, 2), pooled, hidden, gate


@operator("maxattn_nn::squeeze_excite_conv_backward", mutates_args=())  # type: ignore[untyped-decorator]
def squeeze_excite_conv_backward(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    bias: Tensor,
    act: str,
    down: Tensor,
    up: Tensor,
    matrix: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, of `down` and `up` and their biases, and of `matrix` and `offset`."""
    B, C, H, W = x.shape
    rows = dout.permute(0, 2, 3, 1).reshape(B * H * W, -1)
    dy = (rows @ matrix).view(B, H, W, C).permute(0, 3, 1, 2)
    gated, dgate = _gate_backward(dy, x, mean, scale, bias, gate, act)
    slope = gate.float() * (1 - gate.float())
    after = (dgate * slope).to(x.dtype)
    dhidden = torch.ops.aten.silu_backward(after @ up, hidden)
    shift = (dhidden @ down).float() / (H * W)
    dx, dweight, dbias = norms.norm_gradients(dy, x, mean, rstd, scale, bias, act, (gate, shift))
    of_down, of_up = (dhidden.t() @ pooled, dhidden.sum(0)), (after.t() @ F.silu(hidden), after.sum(0))
    dmatrix = rows.t() @ gated.permute(0, 2, 3, 1).reshape(B * H * W, C)
    return dx, dweight, dbias, *of_down, *of_up, dmatrix, rows.sum(0)


def _gate_backward(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, gate: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    """What the convolution was given, like x, and the gradient of the gate, `(B, C)` in fp32."""
    B, C, H, W = x.shape
    rows, per = norms.parts_of_image(H * W, ROWS)
    gated, of_gate = torch.empty_like(x), norms.of_channels(x, B * per)
    with on_device_of(x):
        launch(kernels.gate_backward, B * per, blocks_of(C, CHANNELS))(
            dy, x, mean, scale, bias, gate, gated, of_gate, H * W, C, rows, per,
            ACT=act, BLOCK_M=ROWS, BLOCK_C=CHANNELS, STAGES=3,
        )  # fmt: skip
    return gated, of_gate.view(B, per, C).sum(1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mean, rstd, scale, weight, bias, ctx.act, down, _, up, _, matrix, _ = inputs
    ctx.dtypes = (weight.dtype, bias.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, scale, bias, down, up, matrix, *output[1:])


def _backward(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, mean, rstd, scale, bias, *rest = ctx.saved_tensors
    dx, dweight, dbias, *others = squeeze_excite_conv_backward(dout, x, mean, rstd, scale, bias, ctx.act, *rest)
    of_norm = (dweight.to(ctx.dtypes[0]), dbias.to(ctx.dtypes[1]))
    return asked(ctx, dx, None, None, None, *of_norm, None, *others)


squeeze_excite_conv.register_autograd(_backward, setup_context=_keep)

if not COMPILED:

    @squeeze_excite_conv.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        (B, C, H, W), (down, _, _, _, matrix, _) = x.shape, rest[6:]
        out = x.new_empty(B, H, W, matrix.shape[0]).permute(0, 3, 1, 2)
        return out, x.new_empty(B, C), x.new_empty(B, down.shape[0]), x.new_empty(B, C)

    @squeeze_excite_conv_backward.register_fake  # type: ignore[untyped-decorator]
    def _(dout: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        down, up, matrix = rest[5:8]
        of_norm = (torch.empty_like(x), norms.of_channels(x), norms.of_channels(x))
        matrices = (new for one in (down, up, matrix) for new in (torch.empty_like(one), one.new_empty(one.shape[0])))
        return *of_norm, *matrices
