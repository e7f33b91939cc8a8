"""What decides whether kernels of our own serve, asked also while a compiler traces: to it the answers are constants.

Importing this imports PyTorch's compiler, which takes long: only what is about to use it does.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel


def values_alone(*tensors: Tensor) -> bool:
    """Whether no derivative in these is asked for now, in reverse or forward mode, and no transform of `torch.func`.

    Example:
        >>> values_alone(torch.ones(2)), values_alone(torch.ones(2, requires_grad=True))
        (True, False)
    """
    reverse = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not (reverse or transformed())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def transformed() -> bool:
    """Whether a derivative in forward mode, or a transform of `torch.func`, is under way.

    A compiler guards on the transforms that it traces within.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exporting() -> bool:
    """Whether this is an export. Some compilers answer `torch.compiler.is_exporting()` by yes whenever they trace.

    Example:
        >>> exporting()
        False
    """
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_ddp() -> bool:
    """Whether this is within a `DistributedDataParallel`, for which compilers split their graphs.

    Example:
        >>> in_ddp()
        False
    """
    return DistributedDataParallel._get_active_ddp_module() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is here, and the device no GPU but one that our kernels are made for; a CPU interprets them."""
    return _able(device)


@cache
def _able(device: torch.device) -> bool:
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
