"""Kernels of our own for compiled training on a GPU; in Triton.

Triton is imported at the first call: `serves` says whether to call at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.utils.checkpoint import checkpoint

DEVICES = frozenset({"cuda"})
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def name_of(act: nn.Module) -> str | None:
    """What the kernels call an activation; None if they have no name for it.

    Example:
        >>> name_of(nn.GELU(approximate="tanh")), name_of(nn.Tanh())
        ('gelu_tanh', None)
    """
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    names = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}
    return names.get(type(act))


def serves(x: Tensor, *modules: nn.Module) -> bool:
    """Whether kernels here can take a channels-last `x (B, C, H, W)` in the place of these modules, now.

    They do while `torch.compile` traces, of which nothing else is asked: no hooks, no transforms of `torch.func`, no
    forward-mode derivatives and no export. Eager code has PyTorch's own kernels, each of which takes the host one call.
    """
    if not torch.compiler.is_compiling():
        return False
    from maxattn.ops.tracing import exporting, runs_triton, transformed

    return (
        x.device.type in DEVICES
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.permute(0, 2, 3, 1).is_contiguous()
        and not any(_changed(module) for module in modules)
        and not transformed()
        and not exporting()
        and runs_triton(x.device)
    )


def serves_batch_norm(norm: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `batch_norm_act` computes `act(norm(x))`: in training, and of more than one pixel."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and name_of(act) not in (None, "sigmoid")
        and x.numel() > x.shape[1]
        and serves(x, norm, act)
        and all(one is not None and one.device == x.device for one in (norm.weight, norm.bias))
        and {norm.weight.dtype, norm.bias.dtype} <= {x.dtype, torch.float32}
    )


def serves_depthwise(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `convolved` computes `conv(x)`: a channel each, without a bias, for a gradient.

    x is in the dtype that autocast asks for, or without it in that of the weight.
    """
    kernel = conv.kernel_size[0]
    return (
        serves(x, conv)
        and "weight" in conv._parameters  # and not computed at each access
        and conv.groups == conv.in_channels == conv.out_channels == x.shape[1]
        and conv.bias is None
        and conv.kernel_size in ((3, 3), (5, 5), (7, 7))
        and conv.stride in ((1, 1), (2, 2))
        and conv.dilation == (1, 1)
        and conv.padding == (kernel // 2, kernel // 2)
        and conv.padding_mode == "zeros"
        and torch.is_grad_enabled()
        and x.device == conv.weight.device
        and x.dtype == _computed_in(x.device.type, conv.weight.dtype)
    )


def batch_norm_act(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor) -> Tensor:
    """`act(norm(x))` in training. The running statistics of `norm` are brought forward as its own `forward` does.

    In a compiled graph x and its moments are kept, and the rest is computed again where the backward pass uses it; but
    not within DDP, whose graphs are split, for not every compiler can split one with checkpoints.
    """
    from maxattn.nn.gpu import ops
    from maxattn.ops.tracing import in_ddp

    mean, var, rstd, scale = ops.moments(x.detach(), norm.weight.detach(), norm.eps)
    inputs = (x, mean, rstd, scale, norm.weight, norm.bias, name_of(act))
    if torch.compiler.is_compiling() and not in_ddp():
        y = checkpoint(ops.batch_norm_act, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        y = ops.batch_norm_act(*inputs)
    pixels = x.numel() // x.shape[1]
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        for running, now in ((norm.running_mean, mean), (norm.running_var, var * (pixels / (pixels - 1)))):
            running.copy_(torch.lerp(running.float(), now, norm.momentum))
    out: Tensor = y
    return out


def convolved(conv: nn.Conv2d, x: Tensor, pads: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """`conv` of x with so many zeros around it, ((top, bottom), (left, right)), in place of its own padding."""
    from maxattn.nn.gpu.depthwise import convolve

    return convolve(x, conv.weight, conv.stride[0], pads)


def _computed_in(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a convolution with weights of `dtype`."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def _changed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or bool(has_any_global_hook())
