"""On which GPU a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """For backends whose launcher takes the current GPU, as Triton's does: within the block it is that of `tensor`.

    Nothing is changed for tensors elsewhere, and for fake ones where there is no GPU.

    Example:
        >>> with on_device_of(torch.ones(2)) as nothing:
        ...     nothing is None
        True
    """
    if tensor.is_cuda and torch.cuda.is_initialized():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is here, and the device no GPU but one that our kernels are made for; a CPU interprets them."""
    return _able(device)


@cache
def _able(device: torch.device) -> bool:
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
