"""One call of Max-SA that can be repeated: a `Problem`, and how its tensors lie in memory and what is in them.

Shapes: B batch, H x W pixels, h heads, d head_dim, N tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Problem
from maxattn.testing.groups import token_of_pixel

MARGIN = 64
"""NaNs before and after every tensor: an even multiple of 16 bytes in every dtype, so that aligned stays aligned."""


class Layout(NamedTuple):
    """A view of a larger tensor: the order of its dimensions in memory, and what surrounds the view along each.

    `step` takes every n-th index of a dimension, `extra` elements follow a dimension's last; both by dimension.
    `expanded` is a dimension of stride 0.
    """

    order: tuple[int, ...] = ()
    step: tuple[tuple[int, int], ...] = ()
    extra: tuple[tuple[int, int], ...] = ()
    offset: int = 0
    expanded: int | None = None


QKV_LAYOUTS = {
    "contiguous": Layout(),
    "unaligned": Layout(offset=1),
    "slice of wider pixels": Layout(extra=((3, 1),)),
    "slice of the image": Layout(extra=((1, 2), (2, 3)), offset=5),
    "slice of heads and channels": Layout(extra=((4, 1), (5, 3))),
    "every second column": Layout(step=((2, 2),)),
    "every second row": Layout(step=((1, 2),)),
    "width before height": Layout(order=(0, 2, 1, 3, 4, 5)),
    "batch inside the image": Layout(order=(1, 2, 0, 3, 4, 5)),
    "parts first": Layout(order=(3, 0, 1, 2, 4, 5)),
    "heads before parts": Layout(order=(0, 1, 2, 4, 3, 5)),
    "heads before the image": Layout(order=(3, 0, 4, 1, 2, 5)),
    "expanded batch": Layout(expanded=0),
    "expanded width": Layout(expanded=2),
}
"""Memory layouts of `qkv (B, H, W, 3, h, d)`; the last stride is 1 in all of them, as the operator asks."""

BIAS_LAYOUTS = {
    "contiguous": Layout(),
    "unaligned": Layout(offset=1),
    "heads last": Layout(order=(1, 2, 0)),
    "keys before queries": Layout(order=(0, 2, 1)),
    "slice of a larger table": Layout(step=((2, 2),), extra=((0, 1), (1, 2)), offset=3),
    "expanded over heads": Layout(expanded=0),
    "expanded over queries": Layout(expanded=1),
}
"""Memory layouts of `bias (h, N, N)`."""

GRADIENT_LAYOUTS = {
    "contiguous": Layout(),
    "unaligned": Layout(offset=1),
    "heads before the image": Layout(order=(0, 3, 1, 2, 4)),
    "channels before the image": Layout(order=(0, 3, 4, 1, 2)),
    "slice of wider pixels": Layout(extra=((3, 1), (4, 2))),
    "expanded width": Layout(expanded=2),
}
"""Memory layouts of the gradient of the output `(B, H, W, h, d)`, with any strides. "sum" is one number, expanded."""

VALUES = ("normal", "large", "huge", "constant", "masked", "offset", "zero", "one sign", "scaled gradient")
"""What is in the tensors: `Case.values`.

"large" and "huge" give logits of about 60 and 10,000, whose exponentials and, in fp16, whose sums overflow; "constant"
equal logits; "masked" a bias of -10,000 for about half the keys of each query; "offset" a large term that all logits
of a query share; "one sign" values and gradients that do not cancel; "scaled gradient" one of 1,000, as a scaled loss
gives. Besides, for full windows of an even number of tokens, "cancelling": equal weights, which rounding cannot tell
apart, on values of which half are 128, half are -128, and one has 1 more.
"""


class Inputs(NamedTuple):
    """What a call and its backward pass are given."""

    qkv: Tensor
    bias: Tensor | None
    grad_out: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Of qkv and bias, what needs a gradient."""
        named = (("qkv", self.qkv), ("bias", self.bias))
        return {name: x for name, x in named if x is not None and x.requires_grad}

    def copied(self, dtype: torch.dtype | None = None) -> Inputs:
        """New leaves of the same numbers, in `dtype` if it is given."""
        qkv, bias, grad_out = (None if x is None else x.detach().to(dtype or x.dtype) for x in self)
        for old, new in ((self.qkv, qkv), (self.bias, bias)):
            if old is not None and new is not None:
                new.requires_grad_(old.requires_grad)
        return Inputs(qkv, bias, grad_out)  # type: ignore[arg-type]  # only the bias may be None

    def overwrite(self, others: Inputs) -> None:
        """Put the numbers of `others` in place of these."""
        with torch.no_grad():
            for x, other in zip(self, others, strict=True):
                if x is not None and other is not None:
                    x.copy_(other)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of Max-SA that anybody can repeat.

    Example:
        >>> problem = Problem(axis="grid", window=(2, 2), batch=1, height=4, width=5, heads=2, head_dim=8)
        >>> case = Case(problem=problem, layout="every second column")
        >>> case.tensors().qkv.stride(2) == 2 * 3 * 2 * 8
        True
    """

    problem: Problem
    layout: str = "contiguous"
    bias_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0

    def but(self, **changed: Any) -> Case:
        """The same with other fields of the case or of its problem."""
        own = {name: changed.pop(name) for name in list(changed) if name in self.__dataclass_fields__}
        return replace(self, problem=replace(self.problem, **changed), **own)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, height and width. Raises ValueError where a compiler is to trace them as symbols."""
        batch, height, width = self.problem.batch, self.problem.height, self.problem.width
        if batch is None or height is None or width is None:
            raise ValueError(f"tensors need sizes that are known: {self.problem}")
        return batch, height, width

    def tensors(self) -> Inputs:
        """`qkv`, `bias` and the gradient of the output, surrounded by NaN in memory; the numbers suit every device."""
        problem = self.problem
        qkv, bias, grad_out = self._values()
        layout = "contiguous" if self.grad_layout == "sum" else self.grad_layout
        device, dtype = problem.device, problem.dtype
        laid_grad = lay_out(grad_out.to(device, dtype), GRADIENT_LAYOUTS[layout])
        if self.grad_layout == "sum":
            laid_grad = laid_grad.flatten()[:1].view(1, 1, 1, 1, 1).expand(grad_out.shape)
        laid_qkv = lay_out(qkv.to(device, dtype), QKV_LAYOUTS[self.layout]).requires_grad_(problem.requires_grad)
        if problem.bias is None:
            return Inputs(laid_qkv, None, laid_grad)
        laid_bias = lay_out(bias.to(device, problem.bias), BIAS_LAYOUTS[self.bias_layout])
        return Inputs(laid_qkv, laid_bias.requires_grad_(problem.bias_requires_grad), laid_grad)

    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        problem = self.problem
        B, H, W = self.sizes
        h, d, N = problem.heads, problem.head_dim, problem.tokens
        generator = torch.Generator().manual_seed(self.seed)
        qkv = torch.randn(B, H, W, 3, h, d, generator=generator)
        bias = torch.randn(h, N, N, generator=generator)
        grad_out = torch.randn(B, H, W, h, d, generator=generator)
        q_and_k = qkv[:, :, :, :2]
        match self.values:
            case "large":
                q_and_k *= 8
            case "huge":
                q_and_k *= 100
            case "constant":
                q_and_k.fill_(0.5)
                bias.fill_(0.25)
            case "masked":
                hidden = torch.rand(h, N, N, generator=generator) < 0.5
                hidden[:, torch.arange(N), torch.arange(N)] = False
                bias.masked_fill_(hidden, -10_000.0)
            case "offset":
                q_and_k[:, :, :, 0] += 3
                q_and_k[:, :, :, 1] += 8
            case "zero":
                qkv.zero_()
            case "cancelling":
                q_and_k.zero_()
                bias.zero_()
                qkv[:, :, :, 2] = _cancelling(H, W, problem)
            case "scaled gradient":
                grad_out *= 1000
            case "one sign":
                qkv[:, :, :, 2].abs_()
                grad_out.abs_()
        return qkv, bias, grad_out

    def __str__(self) -> str:
        facts = [str(self.problem)]
        if self.problem.scale is not None:
            facts.append(f"scale {self.problem.scale:g}")
        layouts = (("qkv", self.layout), ("bias", self.bias_layout), ("gradient of the output", self.grad_layout))
        facts += [f"{name}: {layout}" for name, layout in layouts if layout != "contiguous"]
        facts += [f"values: {self.values}"] if self.values != "normal" else []
        return "; ".join([*facts, f"seed {self.seed}"])


def lay_out(values: Tensor, layout: Layout) -> Tensor:
    """A tensor equal to `values`, in its shape, that lies as `layout` says in memory that otherwise holds NaN.

    An expanded dimension takes the values of its first index everywhere.
    """
    shape, steps, extras = values.shape, dict(layout.step), dict(layout.extra)
    strides, total = [0] * values.ndim, 1
    for dim in reversed(layout.order or range(values.ndim)):
        strides[dim] = total * steps.get(dim, 1)
        if dim == layout.expanded:
            strides[dim] = 0
        else:
            total *= max(shape[dim], 1) * steps.get(dim, 1) + extras.get(dim, 0)
    memory = values.new_full((total + 2 * MARGIN + layout.offset,), float("nan"))
    if layout.expanded is not None:
        source = values.narrow(layout.expanded, 0, min(1, shape[layout.expanded]))
        memory.as_strided(source.shape, strides, MARGIN + layout.offset).copy_(source)
        return memory.as_strided(shape, strides, MARGIN + layout.offset)
    return memory.as_strided(shape, strides, MARGIN + layout.offset).copy_(values)


def memory_of(x: Tensor) -> Tensor:
    """All the memory that `x` is a view of, as one flat tensor."""
    return x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _cancelling(height: int, width: int, problem: Problem) -> Tensor:
    """Values `(H, W, 1, 1)` of which, in every window, half are 128, half are -128, and one has 1 more."""
    token = token_of_pixel(height, width, problem, torch.device("cpu"))[:, :, None, None]
    return torch.where(token < problem.tokens // 2, 128.0, -128.0) + (token == 0)
