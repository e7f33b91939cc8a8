"""Norms taken apart: what each does per channel moves into the weights of a neighbour, in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Affine(NamedTuple):
    """A factor and a summand per channel."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """Of a Linear or a convolution: `weight (out, in, ...)`, and `bias (out)` or None."""

    weight: Tensor
    bias: Tensor | None

    def after(self, affine: Affine) -> Weights:
        """The weights that do what `affine` and then these do; of kernels of one pixel, which need no padding.

        Example:
            >>> affine = Affine(scale=torch.tensor([2.0]), shift=torch.tensor([1.0]))
            >>> Weights(torch.tensor([[3.0]]), None).after(affine)
            Weights(weight=tensor([[6.]]), bias=tensor([3.]))
        """
        weight, shape = self.weight.double(), (-1,) + (1,) * (self.weight.ndim - 2)
        bias = (weight * affine.shift.view(shape)).flatten(1).sum(1)
        bias = bias if self.bias is None else bias + self.bias.double()
        return self._rounded(weight * affine.scale.view(shape), bias)

    def before(self, affine: Affine) -> Weights:
        """The weights that do what these and then `affine` do.

        Example:
            >>> affine = Affine(scale=torch.tensor([2.0]), shift=torch.tensor([1.0]))
            >>> Weights(torch.tensor([[3.0]]), torch.tensor([5.0])).before(affine)
            Weights(weight=tensor([[6.]]), bias=tensor([11.]))
        """
        scale = affine.scale.view((-1,) + (1,) * (self.weight.ndim - 1))
        bias = affine.shift if self.bias is None else affine.shift + affine.scale * self.bias.double()
        return self._rounded(self.weight.double() * scale, bias)

    def _rounded(self, weight: Tensor, bias: Tensor) -> Weights:
        return Weights(weight.to(self.weight.dtype), bias.to(self.weight.dtype))


def split(norm: nn.Module) -> tuple[nn.Module, Affine]:
    """A norm in eval mode as a norm without weights, and what its weights do after that, in fp64.

    Of a batch norm nothing remains but its weights.

    Raises:
        TypeError: for a norm of another kind than those of `maxattn.nn`.

    Example:
        >>> split(nn.BatchNorm2d(4))[0], split(nn.LayerNorm(4))[0]
        (Identity(), LayerNorm((4,), eps=1e-05, elementwise_affine=False, bias=False))
    """
    if not isinstance(norm, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        raise TypeError(f"a norm of maxattn.nn is needed, not {type(norm).__name__}")
    scale, bias = norm.weight.detach().double(), getattr(norm, "bias", None)
    shift = torch.zeros_like(scale) if bias is None else bias.detach().double()
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = scale / (norm.running_var.double() + norm.eps).sqrt()
        return nn.Identity(), Affine(scale, shift - norm.running_mean.double() * scale)
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False), Affine(scale, shift)
    bare = type(norm)(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)  # type: ignore[arg-type]
    return bare, Affine(scale, shift)
