"""Kernels of our own for compiled training on a GPU; in Triton.

Triton is imported at the first call: `serves` says whether to call at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

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


def serves(norm: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `batch_norm_act` computes `act(norm(x))` of a channels-last `x (B, C, H, W)`.

    It does while `torch.compile` traces a batch norm in training, of which nothing else is asked: no hooks, no
    transforms of `torch.func`, no forward-mode derivatives, no export, and more than one pixel, without which there is
    no variance. Eager code has PyTorch's own kernels, of which each takes the host one call.
    """
    if not torch.compiler.is_compiling():
        return False
    from maxattn.ops.tracing import runs_triton, transformed

    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and name_of(act) not in (None, "sigmoid")
        and x.device.type in DEVICES
        and x.dtype in DTYPES
        and x.numel() > x.shape[1]
        and x.permute(0, 2, 3, 1).is_contiguous()
        and not any(_changed(part) for part in (norm, act))
        and not transformed()
        and not torch.compiler.is_exporting()
        and runs_triton(x.device)
    )


def batch_norm_act(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor) -> Tensor:
    """`act(norm(x))` in training. The running statistics of `norm` are brought forward as its own `forward` does."""
    from maxattn.nn.gpu import ops

    y, mean, var = ops.batch_norm_act(x.permute(0, 2, 3, 1), norm.weight, norm.bias, norm.eps, name_of(act))
    pixels = x.numel() // x.shape[1]
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * (pixels / (pixels - 1))).to(norm.running_var.dtype), norm.momentum)
    out: Tensor = y.permute(0, 3, 1, 2)
    return out


def _changed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or bool(has_any_global_hook())
