"""`sdpa`, the default: windows through PyTorch's `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from maxattn.ops.contract import Backend, Capabilities, Problem, Reason
from maxattn.ops.windows import LARGEST_BATCH, aligned, for_each_size


class Sdpa(Backend):
    """Partition, one call of PyTorch's kernel per size of group, merge. The bias is broadcast over the"""

    name = "sdpa"
    capabilities = Capabilities()

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if problem.exporting and None in (problem.height, problem.width):
            hint = "export a fixed height and width; the batch may be dynamic"
            return [Reason("dynamic_size", "an exported graph cannot hold every way to cut an image", hint)]
        return ()

    def kernel(self, problem: Problem) -> str:
        if _needs_math(problem):
            return "math"
        if problem.device != "cpu" and not (problem.device == "cuda" and torch.cuda.is_available()):
            return "decided by PyTorch"
        q = torch.empty(
            1,
            problem.heads,
            problem.tokens,
            problem.head_dim,
            dtype=problem.dtype,
            device=problem.device,
            requires_grad=problem.requires_grad,
        )
        mask = None
        if problem.bias is not None:
            mask = q.new_empty(
                1, problem.heads, problem.tokens, problem.tokens, requires_grad=problem.bias_requires_grad
            )
        with torch.set_grad_enabled(problem.differentiated), _inner_kernel(problem):
            choice = torch._fused_sdp_choice(q, q, q, mask, problem.dropout_p, scale=problem.softmax_scale)
        return SDPBackend(choice).name.lower().removesuffix("_attention")

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        def attend_windows(tokens: Tensor, corner: Tensor | None) -> Tensor:
            return _attend_windows(tokens, corner, problem)

        if bias is not None:  # the gradients of its corners are summed in this dtype
            bias = bias.to(torch.promote_types(problem.dtype, torch.float32))
        with _inner_kernel(problem):
            out = for_each_size(qkv, bias, problem.window, problem.axis, attend_windows)
        if problem.batch == 0 and bias is not None:
            return out + bias.sum().to(out.dtype)  # PyTorch leaves the bias of an empty batch out of the graph
        return out


def _attend_windows(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """Attention within each of `qkv (windows, tokens, 3, heads, head_dim)`; returns `(windows, tokens, heads, d)`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    unknown = problem.exporting and problem.batch is None  # to compare would fix the exported graph to one side
    if problem.device == "cpu" or unknown or q.shape[0] <= LARGEST_BATCH:
        return _attend_heads(q, k, v, bias, problem).transpose(1, 2)
    chunks = zip(q.split(LARGEST_BATCH), k.split(LARGEST_BATCH), v.split(LARGEST_BATCH), strict=True)
    return torch.cat([_attend_heads(q, k, v, bias, problem) for q, k, v in chunks]).transpose(1, 2)


def _attend_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """Attention of `(windows, heads, tokens, head_dim)` by PyTorch's kernel."""
    if problem.device == "cpu":
        bias = None if bias is None else bias.unsqueeze(0)
        return F.scaled_dot_product_attention(q, k, v, bias, problem.dropout_p, scale=problem.softmax_scale)
    bias = None if bias is None else bias.to(q.dtype)
    if not problem.compiling:  # a compiler cannot trace the question, and lays out its own tensors
        q, k, v, bias = aligned(q), aligned(k), aligned(v), None if bias is None else aligned(bias)
    mask = None if bias is None else bias.unsqueeze(0)
    out = F.scaled_dot_product_attention(q, k, v, mask, problem.dropout_p, scale=problem.softmax_scale)
    if out.requires_grad and not problem.compiling:
        out.register_hook(aligned)
    return out


def _needs_math(problem: Problem) -> bool:
    """Where the fused CUDA kernels fail, or sum the bias gradient in no fixed order although one is asked for.

    For a scale of 0 flash's gives NaN, for a negative one cuDNN's gives NaN gradients.
    """
    if problem.device != "cuda":
        return False
    only_bias = problem.bias_requires_grad and not problem.requires_grad
    in_no_order = problem.deterministic and problem.differentiated
    return only_bias or in_no_order or problem.batch == 0 or problem.softmax_scale <= 0


def _inner_kernel(problem: Problem) -> AbstractContextManager[None]:
    """The kernels that PyTorch may choose from. cuDNN's drops the same weights for several queries."""
    if _needs_math(problem):
        return sdpa_kernel(SDPBackend.MATH)
    if problem.device == "cuda" and problem.dropout_p > 0:
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return nullcontext()
