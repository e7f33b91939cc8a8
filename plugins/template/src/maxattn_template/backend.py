"""Max-SA in windows, by two matrix products and a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from maxattn import Backend, Capabilities, Problem, Reason
from maxattn.ops.windows import for_each_size


class TemplateBackend(Backend):
    """Copies the windows out of the image and attends in fp32, or in fp64 where that is the dtype of the input."""

    name = "template"
    # State no more than what holds: `maxattn check` tries all of it, and that anything else is refused.
    capabilities = Capabilities(double_backward=True)

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if problem.exporting and None in (problem.height, problem.width):
            hint = "export a fixed height and width; the batch may be dynamic"
            return [Reason("dynamic_size", "an exported graph cannot hold every way to cut an image", hint)]
        return ()

    def relative_speed(self, problem: Problem) -> float:
        # The automatic choice takes the fastest: 1 is as fast as `sdpa`. State what you have measured.
        return 0.5

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        # Import the library that does the work here, where it is first used, so that importing this module is quick.
        bias = None if bias is None else bias.to(torch.promote_types(qkv.dtype, torch.float32))
        return for_each_size(qkv, bias, problem.window, problem.axis, partial(attend_windows, problem))


def attend_windows(problem: Problem, qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Attention within each of `qkv (windows, tokens, 3, heads, head_dim)`; returns `(windows, tokens, heads, d)`."""
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * problem.softmax_scale
    if bias is not None:
        logits = logits + bias
    weights = F.dropout(logits.softmax(-1), problem.dropout_p)
    return (weights @ v).transpose(1, 2).to(qkv.dtype)
