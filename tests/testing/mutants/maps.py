"""The index map: pixels in the wrong group, or at the wrong place in it."""

from __future__ import annotations

import torch
from testing.mutants.base import exact, mutant
from testing.mutants.steps import Steps
from torch import Tensor

from maxattn import Problem
from maxattn.ops.naive import groups_and_tokens

Map = tuple[Tensor, Tensor, Tensor]


@mutant()
def axes_swapped(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """block is grid and grid is block"""
    return exact(qkv, bias, problem, axis="grid" if problem.axis == "block" else "block")


@mutant()
def always_block(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the axis is ignored"""
    return exact(qkv, bias, problem, axis="block")


@mutant()
def window_transposed(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the window is taken as (P_w, P_h)"""
    return exact(qkv, bias, problem, window=problem.window[::-1])


@mutant()
def window_taken_for_square(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the kernel is given one side of the window, its height"""
    N, square = problem.tokens, problem.window[0] ** 2
    if bias is not None:
        bias = bias.flatten(1)[:, torch.arange(square * square, device=qkv.device) % (N * N)].unflatten(
            1, (square, square)
        )
    return exact(qkv, bias, problem, window=problem.window[0])


@mutant()
class GridDilatedByTheWindow(Steps):
    """grid tokens are P pixels apart instead of n = ceil(size / P): the same only for size = P * P"""

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> Map:
        if axis == "block":
            return groups_and_tokens(size, window, axis, device)
        n = -(-size // window)
        a, i = torch.arange(n, device=device)[:, None], torch.arange(window, device=device)[None, :]
        p = torch.arange(size, device=device)
        return i * window + a, (p % window).clamp(max=n - 1), (p // window).clamp(max=window - 1)


@mutant()
class GridDilatedAlikeOnBothSides(Steps):
    """the grid's rows are as far apart as its columns"""

    def image_maps(self, H: int, W: int, problem: Problem, device: torch.device) -> tuple[Map, Map]:
        rows, columns = super().image_maps(H, W, problem, device)
        if problem.axis == "block":
            return rows, columns
        n_h, P_h, n_w = rows[0].shape[0], problem.window[0], columns[0].shape[0]
        a, i = torch.arange(n_h, device=device)[:, None], torch.arange(P_h, device=device)[None, :]
        y = torch.arange(H, device=device)
        return (i * n_w + a, (y % n_w).clamp(max=n_h - 1), (y // n_w).clamp(max=P_h - 1)), columns


@mutant()
class RaggedRectangularGridSidesSwapped(Steps):
    """dilations are swapped between height and width, only on the ragged path of the grid with a rectangular window"""

    def image_maps(self, H: int, W: int, problem: Problem, device: torch.device) -> tuple[Map, Map]:
        rows, columns = super().image_maps(H, W, problem, device)
        P_h, P_w = problem.window
        if problem.axis == "block" or P_h == P_w or not (H % P_h or W % P_w):
            return rows, columns
        n_h, n_w = rows[0].shape[0], columns[0].shape[0]
        sides = []
        for size, window, n, other in ((H, P_h, n_h, n_w), (W, P_w, n_w, n_h)):
            a, i = torch.arange(n, device=device)[:, None], torch.arange(window, device=device)[None, :]
            p = torch.arange(size, device=device)
            sides.append((i * other + a, (p % other).clamp(max=n - 1), (p // other).clamp(max=window - 1)))
        return sides[0], sides[1]


@mutant()
class GridWithOneGroupTooMany(Steps):
    """n = size // P + 1, which is the ceiling only where the window does not divide"""

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> Map:
        if axis == "block":
            return groups_and_tokens(size, window, axis, device)
        n = size // window + 1
        a, i = torch.arange(n, device=device)[:, None], torch.arange(window, device=device)[None, :]
        p = torch.arange(size, device=device)
        return i * n + a, p % n, p // n


@mutant()
class GridWithRoundedDilation(Steps):
    """n is rounded to the nearest instead of up, so the last pixels are in no group"""

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> Map:
        n = max(1, (size + window // 2) // window)
        if axis == "block" or n * window >= size:
            return groups_and_tokens(size, window, axis, device)
        a, i = torch.arange(n, device=device)[:, None], torch.arange(window, device=device)[None, :]
        p = torch.arange(size, device=device).clamp(max=n * window - 1)
        return i * n + a, p % n, p // n


@mutant()
def block_shifted_by_a_pixel(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """windows begin one pixel to the right, and the last wraps around"""
    return exact(qkv.roll(1, 2), bias, problem).roll(-1, 2)


@mutant()
def ragged_blocks_begin_at_the_end(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the image is padded at its top and left instead of its bottom and right"""
    flipped = None if bias is None else bias.flip(1, 2)
    return exact(qkv.flip(1, 2).contiguous(), flipped, problem).flip(1, 2).contiguous()


@mutant()
class RaggedPaddingOnBothSides(Steps):
    """half of the missing pixels are put before the image, so the windows' borders are elsewhere"""

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> Map:
        n = -(-size // window)
        before = (n * window - size) // 2
        pixel, group, token = groups_and_tokens(n * window, window, axis, device)
        pixel = pixel - before
        return torch.where(pixel < 0, size, pixel), group[before : before + size], token[before : before + size]


@mutant()
class ImageTakenForSquare(Steps):
    """the address of a pixel is y * H + x"""

    def to_windows(self, image: Tensor, problem: Problem) -> Tensor:
        H, W = image.shape[1:3]
        y, x = torch.arange(H, device=image.device)[:, None], torch.arange(W, device=image.device)[None, :]
        return super().to_windows(image.flatten(1, 2)[:, (y * H + x) % (H * W)], problem)


@mutant()
class BlockOfAShortImageByRows(Steps):
    """where the image is lower than the window, tokens are counted down the columns that exist"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if bias is None or problem.height is None or problem.height >= problem.window[0]:
            return super().logits(q, k, bias, problem)
        (P_h, P_w), rows = problem.window, problem.height
        i, j = torch.arange(P_h, device=q.device)[:, None], torch.arange(P_w, device=q.device)[None, :]
        token = (j * rows + i).clamp(max=P_h * P_w - 1).reshape(-1)
        return super().logits(q, k, bias[:, token[:, None], token[None, :]], problem)
