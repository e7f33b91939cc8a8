"""What training keeps for the backward pass, and what it computes again there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from maxattn.nn import gpu
from maxattn.ops.dispatch import eager_override, use_backend

Checkpointing = Literal[False, True, "selective"]
"""False: everything is kept. "selective": what matrix products, convolutions and attention have made, while norms,
activations and gates are computed again (Korthikanti et al. 2022, section 5). True: each block's input alone."""


class Selective(nn.Module):
    """A layer whose `forward` is made of parts, each ending with a product; `selective`: only their inputs are kept."""

    selective = False

    def part(self, function: Callable[..., Any], *inputs: Any, random: bool = False) -> Any:
        """`function(*inputs)`: a part of this layer. `random` if it draws random numbers.

        Its last operation is not computed again, for what that makes is the input of the part after it.
        """
        if torch.compiler.is_compiling() or not self._recomputes():
            return function(*inputs)
        return recomputed(self, function, *inputs, random=random)

    def light(self, function: Callable[..., Any], *inputs: Any, random: bool = False) -> Any:
        """`function(*inputs)`: what a part does before its product.

        A compiler is told to compute just this again, for of a whole part it would compute products again as well.
        """
        if not torch.compiler.is_compiling() or not self._recomputes():
            return function(*inputs)
        return recomputed(self, function, *inputs, random=random)

    def normed(self, norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
        """`act(norm(x))` of `(B, C, H, W)`; in compiled training on a GPU by kernels of our own, where they serve."""
        if gpu.serves_batch_norm(norm, act, x):
            return gpu.batch_norm_act(norm, act, x)  # type: ignore[arg-type]
        out: Tensor = self.light(lambda x: act(norm(x)), x)
        return out

    def _recomputes(self) -> bool:
        return self.selective and self.training and torch.is_grad_enabled()


def recomputed(module: nn.Module, function: Callable[..., Any], *inputs: Any, random: bool = True) -> Any:
    """`function(*inputs)`, of which only the inputs are kept; the backward pass computes it again.

    It does so by the same backend of attention, whichever thread that runs in, and the batch norms in `module` do not
    count the batch a second time.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)
    names = eager_override()

    @contextmanager
    def again() -> Iterator[None]:
        with use_backend(names), statistics_kept(module):
            yield

    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=lambda: (nullcontext(), again()),
    )


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within the block batch norms leave their running statistics as they are.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> with statistics_kept(norm):
        ...     _ = norm(torch.randn(2, 3, 4, 4))
        >>> norm.num_batches_tracked.item()
        0
    """
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, settings, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted
