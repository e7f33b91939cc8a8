"""Images that the window does not divide, or that are smaller than it."""

from __future__ import annotations

from typing import Any

import torch
from testing.mutants.base import exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem


@mutant()
class ZeroPaddingAsKeys(Steps):
    """missing pixels are keys of value 0"""

    def masked(self, logits: Tensor, inside: Tensor) -> Tensor:
        return logits


@mutant()
class EdgePixelsAsKeys(Steps):
    """loads are clamped to the image, and the mask is forgotten: the last pixels are keys again and again"""

    def filled(self, windows: Tensor, inside: Tensor) -> Tensor:
        return windows

    def masked(self, logits: Tensor, inside: Tensor) -> Tensor:
        return logits


@mutant()
class EdgePixelsWithWeightZero(Steps):
    """loads are clamped to the image: NaN in its last pixel reaches the windows that give it the weight 0"""

    def filled(self, windows: Tensor, inside: Tensor) -> Tensor:
        return windows


@mutant()
class OnlyRowsMasked(Steps):
    """missing rows are masked, missing columns are not"""

    def inside(self, y: Tensor, x: Tensor, H: int, W: int) -> Tensor:
        return super().inside(y, torch.zeros_like(x), H, W)


@mutant()
class CornerGroupUnmasked(Steps):
    """the group in the corner, where rows and columns are missing, masks only its rows"""

    def inside(self, y: Tensor, x: Tensor, H: int, W: int) -> Tensor:
        rows, columns = (y < H)[:, None, :, None], (x < W)[None, :, None, :]
        corner = ~rows.all(2, keepdim=True) & ~columns.all(3, keepdim=True)
        return (rows & (columns | corner)).flatten(2).flatten(0, 1)


@mutant()
class CornerGroupWithoutBias(Steps):
    """the group in the corner, the last of the four regions of a ragged image, is attended without its bias"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        (P_h, P_w), H, W = problem.window, problem.height, problem.width
        if bias is None or H is None or W is None or H % P_h == 0 or W % P_w == 0:
            return super().logits(q, k, bias, problem)
        inside = self.inside_windows(H, W, problem, q.device).unflatten(1, (P_h, P_w))
        in_corner = ~inside[:, -1, 0] & ~inside[:, 0, -1]
        return super().logits(q, k, None, problem) + bias * ~in_corner[:, None, None, None]


@mutant()
class OnlyTheLastTokenOfASideMasked(Steps):
    """at most one token of each row or column is taken to be missing"""

    def inside(self, y: Tensor, x: Tensor, H: int, W: int) -> Tensor:
        y, x = y.clone(), x.clone()
        y[:, :-1] = 0
        x[:, :-1] = 0
        return super().inside(y, x, H, W)


@mutant()
class MaskOfMinus100(Steps):
    """missing keys have 100 subtracted from their logit, as Swin does it, instead of infinity"""

    def masked(self, logits: Tensor, inside: Tensor) -> Tensor:
        return logits - 100.0 * ~inside[:, None, None, :]


@mutant()
class MissingKeysInTheDenominator(Steps):
    """the weights of missing keys are 0, but their exponentials count in the sum"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        return logits

    def masked(self, logits: Tensor, inside: Tensor) -> Tensor:
        return logits.softmax(-1) * inside[:, None, None, :]


@mutant()
class MaximumOverMissingKeys(Steps):
    """the row's maximum is taken before missing keys are masked: one with a huge bias empties the row"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        return logits

    def masked(self, logits: Tensor, inside: Tensor) -> Tensor:
        shifted = logits - logits.amax(-1, keepdim=True)
        weights = shifted.exp() * inside[:, None, None, :]
        return weights / weights.sum(-1, keepdim=True)


@mutant()
def last_block_moved_inwards(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the last block begins at size - P: it is full, and overlaps the one before it"""
    out = exact(qkv, bias, problem)
    (P_h, P_w), (H, W) = problem.window, qkv.shape[1:3]
    if problem.axis == "grid" or P_h > H or P_w > W:
        return out
    rows, columns = H // P_h * P_h, W // P_w * P_w
    if rows < H:
        last = exact(qkv[:, H - P_h :], bias, problem)
        out = torch.cat((out[:, :rows], last[:, P_h - (H - rows) :]), 1)
    if columns < W:
        last = exact(qkv[:, :, W - P_w :], bias, problem)
        out = torch.cat((out[:, :, :columns], last[:, :, P_w - (W - columns) :]), 2)
    return out.contiguous()


@mutant()
def last_row_of_a_ragged_image_is_v(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the last row of a ragged image is copied through"""
    out, H = exact(qkv, bias, problem), qkv.shape[1]
    return torch.cat((out[:, :-1], qkv[:, -1:, :, 2]), 1).contiguous() if H % problem.window[0] else out


@mutant()
def ragged_rest_not_written(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """groups that are not full are skipped, and the output comes from torch.empty"""
    attended, (P_h, P_w), (H, W) = exact(qkv, bias, problem), problem.window, qkv.shape[1:3]
    n_h, n_w = -(-H // P_h), -(-W // P_w)
    rows, columns = (H // P_h * P_h, W // P_w * P_w)
    if problem.axis == "grid":  # the first groups are full, and they alternate
        rows, columns = (n_h if H % P_h else H), (n_w if W % P_w else W)
    out = torch.empty_like(attended)
    y, x = torch.arange(H, device=qkv.device) < rows, torch.arange(W, device=qkv.device) < columns
    return torch.where((y[:, None] & x)[:, :, None, None], attended, out)


@mutant()
def small_image_interpolated(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """an image smaller than the window makes it smaller, and takes the first rows and columns of the bias"""
    (P_h, P_w), (H, W) = problem.window, qkv.shape[1:3]
    window = min(P_h, H), min(P_w, W)
    N = window[0] * window[1]
    return exact(qkv, None if bias is None else bias[:, :N, :N], problem, window=window)


@mutant()
def small_image_without_bias(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """an image smaller than the window goes to a kernel that knows no bias"""
    (P_h, P_w), (H, W) = problem.window, qkv.shape[1:3]
    return exact(qkv, bias if bias is None or (P_h <= H and P_w <= W) else bias * 0, problem)


@mutant()
class MissingQueriesInTheGradients(Explicit):
    """the backward pass clamps its loads of the output's gradient: missing queries repeat the last pixel's"""

    def incoming(self, grad_out: Tensor, inside: Tensor, problem: Problem) -> Tensor:
        return super().incoming(grad_out, torch.ones_like(inside), problem)


@mutant()
class MissingKeysInTheRecomputedWeights(Explicit):
    """the backward pass computes the weights again without the mask"""

    def recomputed_weights(self, q: Tensor, k: Tensor, bias: Tensor | None, inside: Tensor, problem: Problem) -> Tensor:
        return self.softmax(self.logits(q, k, bias, problem), problem)


@mutant()
class ShortImageGradientOfV(Explicit):
    """the gradient of v is 0 where the image is lower than the window"""

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        grad_qkv, grad_bias = super().backward(ctx, grad_out)
        if grad_qkv.shape[1] < ctx.problem.window[0]:
            grad_qkv[:, :, :, 2] = 0
        return grad_qkv, grad_bias


@mutant()
def ragged_padded_output(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the image is padded with its own reflection, whose pixels are keys"""
    (P_h, P_w), (H, W) = problem.window, qkv.shape[1:3]
    rows = torch.arange(-(-H // P_h) * P_h, device=qkv.device)
    columns = torch.arange(-(-W // P_w) * P_w, device=qkv.device)
    rows, columns = (torch.where(i < n, i, (2 * n - 2 - i) % n) for i, n in ((rows, H), (columns, W)))
    return exact(qkv[:, rows[:, None], columns], bias, problem)[:, :H, :W].contiguous()
