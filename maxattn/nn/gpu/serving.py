"""Whether kernels of our own take the place of PyTorch's in compiled training on a GPU.

They do while `torch.compile` traces, of which nothing else is asked: no hooks, no transforms of `torch.func`, no
forward-mode derivatives and no export. Eager code has PyTorch's own kernels, each of which takes the host one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

DEVICES = frozenset({"cuda"})
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
IDENTITY = nn.Identity()
"""The activation of a norm that has none."""
MOST_CHANNELS = 4096
"""Of a LayerNorm, a program of which holds whole rows."""


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


def serves_batch_norm(norm: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `batch_norm_act` computes `act(norm(x))`: in training, and of more than one pixel."""
    return (
        torch.compiler.is_compiling()
        and x.numel() > x.shape[1]
        and _normalizes(norm, act, x.device, x.dtype)
        and _serves(x, norm, act)
    )


def serves_expanded(pre_norm: nn.Module, conv: nn.Conv2d, norm: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `expanded` computes `act(norm(conv(pre_norm(x))))`, for a gradient; not within DDP."""
    return (
        serves_batch_norm(pre_norm, IDENTITY, x)
        and torch.is_grad_enabled()
        and not _in_ddp()
        and _pointwise(conv)
        and _multiplies(conv, x)
        and _normalizes(norm, act, x.device, computed_in(x.device.type, conv.weight.dtype))
        and _serves(x, conv, norm, act)
    )


def serves_depthwise(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `convolved` computes `conv(x)`: a channel each, without a bias, for a gradient.

    x is in the dtype that autocast asks for, or without it in that of the weight.
    """
    kernel = conv.kernel_size[0]
    return (
        torch.compiler.is_compiling()
        and _serves(x, conv)
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
        and x.dtype == computed_in(x.device.type, conv.weight.dtype)
    )


def serves_squeeze_excite(
    norm: nn.Module,
    act: nn.Module,
    se: nn.Module,
    parts: tuple[nn.Module, nn.Module, nn.Module],
    conv: nn.Conv2d,
    x: Tensor,
) -> bool:
    """Whether `squeeze_excite_conv` computes `conv(se(act(norm(x))))` of the parts of `se`, for a gradient."""
    down, between, up = parts
    products = (down, up, conv)
    return (
        serves_batch_norm(norm, act, x)
        and torch.is_grad_enabled()
        and x.dtype != torch.float32  # in which convolutions and matrix products may round their inputs differently
        and type(between) is nn.SiLU
        and all(_pointwise(one) and _multiplies(one, x) and one.bias is not None for one in products)
        and _serves(x, se, *parts, conv)
        and x.dtype == computed_in(x.device.type, conv.weight.dtype)
    )


def serves_norm_linear(norm: nn.Module, linear: nn.Module, x: Tensor) -> bool:
    """Whether `norm_linear` computes `linear(norm(x))` of x `(B, H, W, C)`, for a gradient."""
    return (
        torch.compiler.is_compiling()
        and type(norm) is nn.LayerNorm
        and type(linear) is nn.Linear
        and norm.normalized_shape == x.shape[-1:]
        and x.shape[-1] <= MOST_CHANNELS
        and torch.is_grad_enabled()
        and _serves(x.permute(0, 3, 1, 2), norm, linear)
        and all(one is not None and one.device == x.device for one in (norm.weight, norm.bias))
        and _multiplies(linear, x)
    )


def serves_mlp(
    norm: nn.Module, first: nn.Module, act: nn.Module, drop: nn.Module, second: nn.Module, x: Tensor
) -> bool:
    """Whether `mlp` computes `second(drop(act(first(norm(x)))))` of x `(B, H, W, C)`, for a gradient."""
    return (
        type(second) is nn.Linear
        and type(drop) is nn.Dropout
        and drop.p == 0
        and name_of(act) not in (None, "none", "sigmoid")
        and serves_norm_linear(norm, first, x)
        and _serves(x.permute(0, 3, 1, 2), act, drop, second)
        and _multiplies(second, x)
        and all(one.bias is not None for one in (first, second))
    )


def computed_in(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product with weights of `dtype`."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def unchanged(module: nn.Module) -> bool:
    """Whether a call of the module does what its class says, and no more."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not (any(hooks) or "forward" in vars(module) or bool(has_any_global_hook()))


def _in_ddp() -> bool:
    from maxattn.ops.tracing import in_ddp

    return in_ddp()


def _serves(x: Tensor, *modules: nn.Module) -> bool:
    """Whether kernels here can take a channels-last `x (B, C, H, W)` in the place of these modules."""
    from maxattn.ops.tracing import exporting, runs_triton, transformed

    return (
        x.device.type in DEVICES
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.permute(0, 2, 3, 1).is_contiguous()
        and all(unchanged(module) and _plain(module) for module in modules)
        and not transformed()
        and not exporting()
        and runs_triton(x.device)
    )


def _normalizes(norm: nn.Module, act: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels here compute `act(norm(x))` in training, by what the two are, of an x of such a dtype."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and name_of(act) not in (None, "sigmoid")
        and all(one is not None and one.device == device for one in (norm.weight, norm.bias))
        and {norm.weight.dtype, norm.bias.dtype} <= {dtype, torch.float32}
    )


def _plain(module: nn.Module) -> bool:
    """Whether its parameters are PyTorch's own, and none of a subclass, which may be sharded or quantized."""
    return all(one is None or type(one) in (Tensor, nn.Parameter) for one in module._parameters.values())


def _multiplies(layer: nn.Module, x: Tensor) -> bool:
    """Whether the weight is one that no call computes; and if weight and bias are where x is, and fit its dtype."""
    there = [one for one in layer._parameters.values() if one is not None]
    any_dtype = torch.is_autocast_enabled(x.device.type)
    return "weight" in layer._parameters and all(
        one.device == x.device and one.dtype in DTYPES and (any_dtype or one.dtype == x.dtype) for one in there
    )


def _pointwise(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), 0)
    )
