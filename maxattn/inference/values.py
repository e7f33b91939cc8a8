"""Whether a call wants values and nothing else: kernels without derivatives must not serve others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def values_alone(*tensors: Tensor) -> bool:
    """Whether no derivative in these is asked for now, in reverse or forward mode, and no transform of `torch.func`.

    Example:
        >>> values_alone(torch.ones(2)), values_alone(torch.ones(2, requires_grad=True))
        (True, False)
    """
    reverse = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not (reverse or _transformed())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transformed() -> bool:
    """A compiler guards on the transforms that it traces within."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
