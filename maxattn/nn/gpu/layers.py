"""What takes the place of a few layers in compiled training on a GPU, where `serving` says so.

The operators are imported, and Triton with them, at the first call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maxattn.nn.gpu.serving import computed_in, name_of


def batch_norm_act(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor) -> Tensor:
    """`act(norm(x))` in training. The running statistics of `norm` are brought forward as its own `forward` does.

    In a compiled graph x and its moments are kept, and the rest is computed again where the backward pass uses it; but
    not within DDP, whose graphs are split, for not every compiler can split one with checkpoints.
    """
    from maxattn.nn.gpu import batch_norm
    from maxattn.ops.tracing import in_ddp

    mean, var, rstd, scale = _moments(norm, x)
    inputs = (x, mean, rstd, scale, norm.weight, norm.bias, name_of(act))
    if torch.compiler.is_compiling() and not in_ddp():
        y = checkpoint(batch_norm.batch_norm_act, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        y = batch_norm.batch_norm_act(*inputs)
    _bring_forward(norm, mean, var, x)
    out: Tensor = y
    return out


def expanded(pre_norm: nn.BatchNorm2d, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: nn.Module, x: Tensor) -> Tensor:
    """`act(norm(conv(pre_norm(x))))` in training, with a 1x1 convolution, of which x and its moments alone are kept.

    What the convolution makes, and its moments, are computed again. Running statistics are brought forward as in
    `batch_norm_act`.
    """
    from maxattn.nn.gpu.batch_norm import batch_norm_act

    mean, var, rstd, scale = _moments(pre_norm, x)

    def computed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = conv(batch_norm_act(x, mean, rstd, scale, pre_norm.weight, pre_norm.bias, "none"))
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        of_hidden = _moments(norm, hidden)
        of_norm = (of_hidden[0], *of_hidden[2:], norm.weight, norm.bias)
        return batch_norm_act(hidden, *of_norm, name_of(act)), *of_hidden[:2]

    out: tuple[Tensor, Tensor, Tensor] = checkpoint(computed, x, use_reentrant=False, preserve_rng_state=False)
    _bring_forward(pre_norm, mean, var, x)
    _bring_forward(norm, *out[1:], x)
    return out[0]


def squeeze_excite_conv(
    norm: nn.BatchNorm2d, act: nn.Module, se: tuple[nn.Conv2d, nn.Module, nn.Conv2d], conv: nn.Conv2d, x: Tensor
) -> Tensor:
    """`conv(a * up(between(down(mean of a))).sigmoid())` with `a = act(norm(x))`, in training.

    x, its moments and what squeeze-excitation makes of an image are kept.
    """
    from maxattn.nn.gpu.squeeze import squeeze_excite_conv

    mean, var, rstd, scale = _moments(norm, x)
    matrices = (one for conv in (se[0], se[2], conv) for one in _matrix(conv, x.dtype))
    out: Tensor = squeeze_excite_conv(x, mean, rstd, scale, norm.weight, norm.bias, name_of(act), *matrices)[0]
    _bring_forward(norm, mean, var, x)
    return out


def convolved(conv: nn.Conv2d, x: Tensor, pads: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """`conv` of x with so many zeros around it, ((top, bottom), (left, right)), in place of its own padding."""
    from maxattn.nn.gpu.depthwise import convolve

    return convolve(x, conv.weight, conv.stride[0], pads)


def norm_linear(norm: nn.LayerNorm, linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """x again, to be read in its stead, and `linear(norm(x))`; x alone is kept."""
    return _norm_linear(norm, x, *_matrix(linear, computed_in(x.device.type, linear.weight.dtype)))


def mlp(norm: nn.LayerNorm, first: nn.Linear, act: nn.Module, second: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """x again, to be read in its stead, and `second(act(first(norm(x))))`; x and what `first` makes are kept."""
    from maxattn.nn.gpu.tokens import activation_linear

    dtype = computed_in(x.device.type, first.weight.dtype)
    x, hidden = _norm_linear(norm, x, _matrix(first, dtype)[0], None)
    return x, activation_linear(hidden, first.bias, name_of(act), *_matrix(second, dtype))


def _moments(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from maxattn.nn.gpu.batch_norm import moments

    found: tuple[Tensor, Tensor, Tensor, Tensor] = moments(x.detach(), norm.weight.detach(), norm.eps)
    return found


def _bring_forward(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, x: Tensor) -> None:
    """The running statistics, as the norm's own `forward` does it."""
    pixels = x.numel() // x.shape[1]
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        for running, now in ((norm.running_mean, mean), (norm.running_var, var * (pixels / (pixels - 1)))):
            running.copy_(torch.lerp(running.float(), now, norm.momentum))


def _norm_linear(norm: nn.LayerNorm, x: Tensor, matrix: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    from maxattn.nn.gpu.tokens import layer_norm_linear

    again, out = layer_norm_linear(x, norm.weight, norm.bias, norm.eps, matrix, offset)
    return again, out


def _matrix(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight of a Linear or a 1x1 convolution as a matrix, and its bias, in a dtype."""
    return layer.weight.flatten(1).to(dtype), None if layer.bias is None else layer.bias.to(dtype)
