"""On which GPU a kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
