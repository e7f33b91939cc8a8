"""Numbers of heads, dims, tokens, windows and images that the author did not try."""

from __future__ import annotations

import torch
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Problem


@mutant()
def k_and_v_swapped(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """qkv is unpacked as q, v, k"""
    return exact(qkv[:, :, :, [0, 2, 1]], bias, problem)


@mutant()
def q_and_k_swapped(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """qkv is unpacked as k, q, v, which transposes the logits"""
    return exact(qkv[:, :, :, [1, 0, 2]], bias, problem)


@mutant()
def heads_before_the_three(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """channels are unpacked as (heads, 3, head_dim), timm's order"""
    h, d = problem.heads, problem.head_dim
    return exact(qkv.flatten(3).unflatten(3, (h, 3, d)).transpose(3, 4), bias, problem)


@mutant()
def heads_interleaved_in_the_output(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """channels of the output are packed as (head_dim, heads)"""
    return exact(qkv, bias, problem).transpose(3, 4).flatten(3).unflatten(3, (problem.heads, problem.head_dim))


@mutant()
def heads_reversed(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the last head is written first"""
    return exact(qkv, bias, problem).flip(3)


@mutant()
def heads_above_8_repeat(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """head 8 reads the q, k and v of head 0"""
    return exact(qkv[:, :, :, :, torch.arange(problem.heads, device=qkv.device) % 8], bias, problem)


@mutant()
def heads_above_16_left_zero(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """at most 16 heads are computed"""
    keep = torch.arange(problem.heads, device=qkv.device) < 16
    return (exact(qkv, bias, problem) * keep[:, None]).contiguous()


@mutant()
class KeysAbove256Ignored(Steps):
    """a window's keys are one tile of at most 256"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        key = torch.arange(k.shape[-2], device=k.device)
        return super().logits(q, k, bias, problem).masked_fill(key >= 256, float("-inf"))


@mutant()
class LastPartialTileSkipped(Steps):
    """the loop over tiles of 64 keys runs N // 64 times: the keys after the last full tile are left out"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        key, N = torch.arange(k.shape[-2], device=k.device), k.shape[-2]
        return super().logits(q, k, bias, problem).masked_fill(key >= (N // 64 * 64 or N), float("-inf"))


@mutant()
class TokensAfterTheLast16Ignored(Steps):
    """tensor cores take 16 keys at a time: a rest of fewer is ignored"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        key, N = torch.arange(k.shape[-2], device=k.device), k.shape[-2]
        return super().logits(q, k, bias, problem).masked_fill(key >= (N // 16 * 16 or N), float("-inf"))


@mutant()
class TilesRescaledOnce(Steps):
    """online softmax over tiles of 128 keys: the second tile's larger maximum does not rescale the values so far"""

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        maximum, total, parts = None, 0.0, []
        for tile in logits.split(128, -1):
            largest = tile.amax(-1, keepdim=True)
            new = largest if maximum is None else torch.maximum(maximum, largest)
            new = new.clamp(min=torch.finfo(logits.dtype).min)
            if maximum is not None:
                total = total * (maximum - new).exp()
            parts.append((tile - new).exp())
            total, maximum = total + parts[-1].sum(-1, keepdim=True), new
        return torch.cat(parts, -1) / total


@mutant()
def head_dim_rounded_down_to_a_power_of_two(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the product of q and k runs over the largest power of two of dims"""
    dims = torch.arange(problem.head_dim, device=qkv.device) < 2 ** (problem.head_dim.bit_length() - 1)
    keep = torch.stack((dims, dims, torch.ones_like(dims)))[:, None]
    return exact(qkv * keep, bias, problem)


@mutant()
def head_dim_above_64_ignored(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the product of q and k runs over at most 64 dims"""
    dims = torch.arange(problem.head_dim, device=qkv.device) < 64
    keep = torch.stack((dims, dims, torch.ones_like(dims)))[:, None]
    return exact(qkv * keep, bias, problem)


@mutant()
def head_dim_of_one_squared(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a head of a single dim is broadcast: its logits are q * q"""
    return exact(qkv[:, :, :, [0, 0, 2]] if problem.head_dim == 1 else qkv, bias, problem)


@mutant()
def window_of_one_token_left_zero(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a softmax over one key comes out as 0"""
    return exact(qkv, bias, problem) * (problem.tokens > 1)


@mutant()
class WindowsAbove65535Dropped(Steps):
    """windows are a grid axis of 16 bits: later ones are left zero"""

    def to_image(self, windows: Tensor, H: int, W: int, problem: Problem) -> Tensor:
        B, G = windows.shape[:2]
        window = torch.arange(B * G, device=windows.device).view(B, G, *(1,) * (windows.ndim - 2))
        return super().to_image(windows * (window < 65_535), H, W, problem)


@mutant()
class WindowsOfAnImageAbove1024Dropped(Steps):
    """an image has at most 1,024 windows: later ones are left zero"""

    def to_image(self, windows: Tensor, H: int, W: int, problem: Problem) -> Tensor:
        window = torch.arange(windows.shape[1], device=windows.device).view(-1, *(1,) * (windows.ndim - 2))
        return super().to_image(windows * (window < 1024), H, W, problem)


@mutant()
class LastGroupDropped(Steps):
    """the last group of each image is left zero"""

    def to_image(self, windows: Tensor, H: int, W: int, problem: Problem) -> Tensor:
        window = torch.arange(windows.shape[1], device=windows.device).view(-1, *(1,) * (windows.ndim - 2))
        return super().to_image(windows * (window < windows.shape[1] - 1), H, W, problem)


@mutant()
class LastWindowOfAnOddNumberLeftUnwritten(Steps):
    """a program takes two windows: the last of an odd number is not written"""

    def to_image(self, windows: Tensor, H: int, W: int, problem: Problem) -> Tensor:
        B, G = windows.shape[:2]
        window = torch.arange(B * G, device=windows.device).view(B, G, *(1,) * (windows.ndim - 2))
        written = window < (B * G // 2 * 2 if B * G > 1 else 1)
        return super().to_image(torch.where(written, windows, torch.empty_like(windows)), H, W, problem)


@mutant()
def later_images_get_the_first_ones_bias_twice(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the pointer to the bias is moved on with the image, and wraps around to the next head"""
    if bias is None or problem.heads == 1 or qkv.shape[0] < 2:
        return exact(qkv, bias, problem)
    return torch.cat((exact(qkv[:1], bias, problem), exact(qkv[1:], bias.roll(1, 0), problem)))


@mutant()
def images_above_the_third_repeat(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """an image's number is kept in two bits"""
    return exact(qkv[torch.arange(qkv.shape[0], device=qkv.device) % 4], bias, problem)


@mutant(**EAGER)
def empty_batch_raises(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a grid of no programs cannot be launched"""
    if problem.batch == 0:
        raise RuntimeError("invalid configuration argument")
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def empty_batch_without_bias_gradient(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """an empty batch returns early, and the output does not depend on the bias"""
    return exact(qkv, None if problem.batch == 0 else bias, problem)


@mutant(**EAGER)
def empty_batch_detached(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """an empty batch returns a new tensor that requires no gradient"""
    return qkv.new_empty(qkv[:, :, :, 0].shape) if problem.batch == 0 else exact(qkv, bias, problem)


@mutant()
class EmptyBatchLeavesTheBiasGradientUnwritten(Explicit):
    """the bias gradient of an empty batch is what torch.empty returned"""

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        if grad_logits.shape[0]:
            return super().bias_gradient(grad_logits, problem)
        return grad_logits.new_empty(grad_logits.shape[2:])


@mutant()
def odd_width_read_as_even(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """columns are loaded in pairs, and an odd width repeats its last but one"""
    W = qkv.shape[2]
    columns = torch.arange(W, device=qkv.device)
    return exact(qkv[:, :, torch.where(columns == W - 1, W - 2, columns)] if W % 2 and W > 1 else qkv, bias, problem)
