"""`natten`, as maxattn sees it: windows that neighborhood attention finds in the image by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from maxattn.ops.contract import Backend, Capabilities, Problem, Reason
from maxattn.ops.windows import LARGEST_BATCH, fused, positive_scale
from maxattn_natten import library


class Natten(Backend):
    """Blocks are neighbourhoods that step by their own size, grids are neighbourhoods dilated over the whole image."""

    name = "natten"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        compute_capability=((8, 0), (12, 1)),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_dims=(8, 256),
        head_dim_multiple=8,
        bias=False,
        bias_gradient=False,
        dropout=False,
        ragged=False,
        compile=False,
        export=False,
    )

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        missing = self.missing()
        if missing is not None:
            return [missing]
        found = []
        if min(problem.window) < 2:
            told = f"a neighbourhood of {problem.window[0]} x {problem.window[1]} tokens is too small"
            found.append(Reason("window", told, "at least 2 x 2"))
        most = LARGEST_BATCH // problem.heads
        if prod(dilation_of(problem)) > most:
            told = f"the grid has more windows than CUDA kernels can address at {problem.heads} heads"
            found.append(Reason("windows", told, f"up to {most} windows an image"))
        return found

    def relative_speed(self, problem: Problem) -> float:
        return 0.9  # not measured: never chosen before `sdpa`

    def missing(self) -> Reason | None:
        """Why the library cannot be used at all; None if it can."""
        return library.missing(library.installed())

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        # Windows of a grid share an axis of CUDA's launch grid with the batch, or with the heads.
        most = LARGEST_BATCH // prod(dilation_of(problem))
        return fused(qkv, None, partial(self._attend_images, problem), largest_batch=most).contiguous()

    def na2d(
        self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], dilation: tuple[int, int], scale: float
    ) -> Tensor:
        """Neighborhood attention of `(B, H, W, heads, head_dim)`, in neighbourhoods that do not overlap."""
        import natten

        out: Tensor = natten.na2d(q, k, v, kernel_size=window, stride=window, dilation=dilation, scale=scale)
        return out

    def _attend_images(self, problem: Problem, qkv: Tensor, bias: Tensor | None) -> Tensor:
        qkv, scale = positive_scale(qkv, problem.softmax_scale)  # NATTEN takes a scale of 0 for none
        q, k, v = qkv.unbind(-3)
        return self.na2d(q, k, v, problem.window, dilation_of(problem), scale)


def dilation_of(problem: Problem) -> tuple[int, int]:
    """Pixels from one token of a window to the next, down and across.

    Example:
        >>> problem = Problem(axis="grid", window=(7, 7), batch=1, height=56, width=28, heads=1, head_dim=8)
        >>> dilation_of(problem)
        (8, 4)
    """
    assert problem.height is not None  # a compiler's symbols are not served
    assert problem.width is not None
    if problem.axis == "block":
        return 1, 1
    return problem.height // problem.window[0], problem.width // problem.window[1]
