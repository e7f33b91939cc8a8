"""The bias: the wrong entries, at the wrong place, or none."""

from __future__ import annotations

import torch
from testing.mutants.base import exact, mutant
from testing.mutants.steps import Steps
from torch import Tensor

import maxattn
from maxattn import Backend, Problem
from maxattn.ops import windows


@mutant()
def bias_transposed(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is read key first"""
    return exact(qkv, None if bias is None else bias.transpose(1, 2), problem)


@mutant()
def bias_of_the_next_head(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """each head gets the bias of the one after it"""
    return exact(qkv, None if bias is None else bias.roll(1, 0), problem)


@mutant()
def bias_of_the_first_head(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """all heads get the bias of the first"""
    return exact(qkv, None if bias is None else bias[:1].expand_as(bias), problem)


@mutant()
def bias_of_heads_modulo_8(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias tile is fetched for 8 heads: head 8 gets the bias of head 0"""
    heads = torch.arange(problem.heads, device=qkv.device) % 8
    return exact(qkv, None if bias is None else bias[heads], problem)


@mutant()
def bias_added_before_the_scale(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is added to the logits before they are scaled"""
    return exact(qkv, None if bias is None else bias * problem.softmax_scale, problem)


@mutant()
def bias_multiplied(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the base-2 softmax scales the bias by log2(e) twice"""
    return exact(qkv, None if bias is None else bias * 1.4426950408889634, problem)


@mutant()
def bias_ignored(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is only multiplied by 0, so that its gradient exists"""
    return exact(qkv, None if bias is None else bias * 0, problem)


@mutant()
def bias_ignored_for_inference(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the inference path forgets the bias"""
    return exact(qkv, bias if problem.differentiated else None, problem)


@mutant()
class BiasNotAddedToTheLastRow(Steps):
    """the loop that adds the bias stops one query early"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        rows = torch.arange(q.shape[-2], device=q.device)[:, None]
        return super().logits(q, k, None if bias is None else bias * (rows < q.shape[-2] - 1), problem)


@mutant()
class BiasOfTheFirst64Tokens(Steps):
    """one bias tile of 64 x 64 is loaded, whatever the window"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        in_tile = torch.arange(q.shape[-2], device=q.device) < 64
        return super().logits(q, k, None if bias is None else bias * (in_tile[:, None] & in_tile), problem)


@mutant()
class BiasOneColumnOff(Steps):
    """the bias is read one key to the right"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().logits(q, k, None if bias is None else bias.roll(1, 2), problem)


@mutant(export=False)
class BiasOfARaggedGroupNotCutOut(Backend):
    """a group at the edge of the image takes the first rows and columns of the bias for those of its tokens"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        def attend_windows(tokens: Tensor, corner: Tensor | None) -> Tensor:
            N = tokens.shape[1]
            first = None if bias is None else bias[:, :N, :N]
            image = tokens[:, None]
            return maxattn.max_sa(
                image, "block", (1, N), first, problem.softmax_scale, problem.dropout_p, backend="naive"
            )[:, 0]

        return windows.for_each_size(qkv, bias, problem.window, problem.axis, attend_windows)


@mutant()
def bias_column_major_tokens(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """tokens are counted down the columns of the window, which shows only in the bias"""
    if bias is None:
        return exact(qkv, bias, problem)
    P_h, P_w = problem.window
    order = torch.arange(P_h * P_w, device=qkv.device).view(P_w, P_h).transpose(0, 1).reshape(-1)
    return exact(qkv, bias[:, order[:, None], order[None, :]], problem)


@mutant()
def bias_clamped(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the bias is clamped to [-8, 8], "which no learned bias exceeds" """
    return exact(qkv, None if bias is None else bias.clamp(-8, 8), problem)
