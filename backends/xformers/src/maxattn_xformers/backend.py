"""`xformers`, as maxattn sees it: windows through memory-efficient attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from maxattn.ops.contract import Backend, Capabilities, MeasuredSpeed, Problem, Reason
from maxattn.ops.windows import aligned, for_each_size, fused, positive_scale
from maxattn_xformers import library

MULTIPLE = 8
"""Head dims are multiples of this, and so are the strides of the bias: 16 bytes."""

MEASURED = MeasuredSpeed(
    inference=((49, 2.1), (64, 1.3), (144, 0.89), (256, 0.64), (inf, 0.53)),
    training=((64, 1.15), (144, 1.08), (inf, 1.04)),
    inference_without_bias=((64, 1.15), (144, 0.8), (256, 0.62), (inf, 0.5)),
    training_without_bias=((49, 1.38), (64, 1.43), (144, 0.8), (256, 0.68), (inf, 0.49)),
)
"""On an NVIDIA H200 in bfloat16, xFormers 0.0.35, replayed from CUDA graphs."""


class Xformers(Backend):
    """Copies the windows out of the image, and calls the kernel on them. Its bias has a row a window, of stride 0."""

    name = "xformers"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        compute_capability=((8, 0), (9, 0)),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=(MULTIPLE, 256),
        head_dim_multiple=MULTIPLE,
        compile=False,
        export=False,
    )

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        missing = self.missing()
        if missing is not None:
            return [missing]
        found = []
        if problem.bias_requires_grad and not problem.requires_grad:
            told = "the gradient of the bias is not computed where qkv needs none"
            found.append(Reason("bias_gradient", told, "let qkv require a gradient too"))
        if problem.deterministic and problem.differentiated:
            found.append(Reason("deterministic", "the backward pass adds up in no fixed order", "no gradient"))
        return found

    def relative_speed(self, problem: Problem) -> float:
        return MEASURED.of(problem)

    def missing(self) -> Reason | None:
        """Why the library cannot be used at all; None if it can."""
        return library.missing(library.installed())

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if bias is not None:  # the gradients of its corners are summed in this dtype
            bias = bias.to(torch.promote_types(problem.dtype, torch.float32))
        return for_each_size(qkv, bias, problem.window, problem.axis, partial(self._attend_windows, problem))

    def memory_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float, scale: float
    ) -> Tensor:
        """The kernel: q, k, v `(windows, tokens, heads, d)`, bias `(windows, heads, tokens, tokens)`."""
        return library.memory_efficient_attention(q, k, v, bias, dropout_p, scale)

    def _attend_windows(self, problem: Problem, qkv: Tensor, bias: Tensor | None) -> Tensor:
        return fused(qkv, bias, partial(self._attend_some, problem))

    def _attend_some(self, problem: Problem, qkv: Tensor, bias: Tensor | None) -> Tensor:
        qkv, scale = positive_scale(qkv, problem.softmax_scale)
        bias = None if bias is None else one_a_window(bias.to(qkv.dtype), qkv.shape[0])
        q, k, v = qkv.unbind(2)
        return self.memory_efficient_attention(q, k, v, bias, problem.dropout_p, scale)


def one_a_window(bias: Tensor, windows: int) -> Tensor:
    """`bias (heads, N, N)` as `(windows, heads, N, N)`, with strides that are multiples of 8.

    Example:
        >>> one_a_window(torch.zeros(2, 9, 9), windows=5).stride()
        (0, 144, 16, 1)
    """
    tokens = bias.shape[-1]
    padded = aligned(F.pad(bias, (0, -tokens % MULTIPLE)))
    return padded[..., :tokens].expand(windows, -1, -1, -1)
