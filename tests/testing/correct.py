"""Backends that are right and unlike each other, in how they compute or in what they can: the kit passes them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from testing.limited import LIMITED
from testing.mutants.base import EAGER
from testing.mutants.operators import Operators
from testing.mutants.steps import Attention, Explicit, Steps
from torch import Tensor
from torch.autograd.function import once_differentiable

from maxattn import Backend, Capabilities, Problem, Reason
from maxattn.ops import windows
from maxattn.ops.naive import Naive, groups_and_tokens

LOG2_E = 1.4426950408889634


def with_empty_batch(out: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """`out`, made to depend on the bias where there are no windows that could."""
    return out + bias.sum().to(out.dtype) if bias is not None and problem.batch == 0 else out


class Windows(Backend):
    """Attention within windows that are cut out of the image, by `attend_windows`."""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        wide = torch.promote_types(qkv.dtype, torch.float32)

        def attend_windows(tokens: Tensor, corner: Tensor | None) -> Tensor:
            q, k, v = tokens.to(wide).permute(2, 0, 3, 1, 4)
            return self.attend_windows(q, k, v, corner, problem).transpose(1, 2).to(tokens.dtype)

        table = None if bias is None else bias.to(wide)
        return with_empty_batch(
            windows.for_each_size(qkv, table, problem.window, problem.axis, attend_windows), bias, problem
        )

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        """Attention of `(windows, heads, tokens, head_dim)` in fp32 or fp64."""
        raise NotImplementedError


class OnlineSoftmax(Windows):
    """Tiles of 32 keys, with a running maximum and sum."""

    name = "online_softmax"
    capabilities = Capabilities(dropout=False, **EAGER)

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        maximum = torch.full_like(q[..., :1], -torch.inf)
        total, out = torch.zeros_like(maximum), torch.zeros_like(q)
        for first in range(0, k.shape[2], 32):
            tile = slice(first, first + 32)
            logits = q @ k[:, :, tile].transpose(-2, -1) * problem.softmax_scale
            logits = logits if bias is None else logits + bias[:, :, tile]
            larger = torch.maximum(maximum, logits.detach().amax(-1, keepdim=True))
            weights, shrink = (logits - larger).exp(), (maximum - larger).exp()
            total, out = total * shrink + weights.sum(-1, keepdim=True), out * shrink + weights @ v[:, :, tile]
            maximum = larger
        return out / total


class BaseTwo(Windows):
    """log2(e) is folded into the scale and the bias, and exponentials are exp2."""

    name = "base_two"
    capabilities = Capabilities(dropout=False, **EAGER)

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        logits = q @ k.transpose(-2, -1) * (problem.softmax_scale * LOG2_E)
        logits = logits if bias is None else logits + bias * LOG2_E
        weights = torch.exp2(logits - logits.detach().amax(-1, keepdim=True))
        return (weights @ v) / weights.sum(-1, keepdim=True)


class BiasInTheDtypeOfQkv(Windows):
    """The bias is cast to the dtype of qkv, as kernels that want one dtype do."""

    name = "bias_in_the_dtype_of_qkv"
    capabilities = Capabilities(**EAGER)

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        mask = None if bias is None else bias.to(problem.dtype).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, problem.dropout_p, scale=problem.softmax_scale)


class PaddedAndMasked(Backend):
    """The image is padded with zeros to full windows, the mask of what is missing is added to the bias."""

    name = "padded_and_masked"
    capabilities = Capabilities(**EAGER)

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        (B, H, W), (P_h, P_w), grid = qkv.shape[:3], problem.window, problem.axis == "grid"
        rest_h, rest_w = -H % P_h, -W % P_w
        padded = F.pad(qkv.flatten(3), (0, 0, 0, rest_w, 0, rest_h)).unflatten(3, qkv.shape[3:])
        there = F.pad(torch.ones(1, H, W, 1, device=qkv.device), (0, 0, 0, rest_w, 0, rest_h))
        q, k, v = self.cut(padded, problem.window, grid).permute(2, 0, 3, 1, 4)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        mask = torch.zeros((), dtype=wide, device=qkv.device) if bias is None else bias.to(wide)
        absent = self.cut(there, problem.window, grid)[:, None, None, :, 0] == 0
        mask = mask.masked_fill(absent, -torch.inf).repeat(B, 1, 1, 1)
        mask = mask.expand(-1, problem.heads, problem.tokens, -1)
        q, k, v = (x.to(wide) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, problem.dropout_p, scale=problem.softmax_scale)
        rows, columns = (H + rest_h) // P_h, (W + rest_w) // P_w
        out = out.transpose(1, 2).reshape(B, rows, columns, P_h, P_w, *qkv.shape[4:])
        out = out.permute(0, 3, 1, 4, 2, 5, 6) if grid else out.permute(0, 1, 3, 2, 4, 5, 6)
        out = out.flatten(3, 4).flatten(1, 2)[:, :H, :W].to(qkv.dtype).contiguous()
        return with_empty_batch(out, bias, problem)

    def cut(self, image: Tensor, window: tuple[int, int], grid: bool) -> Tensor:
        """`(B, H, W, ...)` to `(B * groups, tokens, ...)`."""
        P_h, P_w = window
        if grid:
            tiles = image.unflatten(2, (P_w, -1)).unflatten(1, (P_h, -1)).movedim((2, 4), (1, 2))
        else:
            tiles = image.unflatten(2, (-1, P_w)).unflatten(1, (-1, P_h)).transpose(2, 3)
        return tiles.flatten(3, 4).flatten(0, 2)


class WindowByWindow(Backend):
    """A loop over images and groups, in Python."""

    name = "window_by_window"
    capabilities = Capabilities(dropout=False, **EAGER)

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        groups = math.prod(-(-n // P) for n, P in zip((problem.height, problem.width), problem.window, strict=True))
        if problem.batch * groups > 100:
            return [Reason("size", "more than 100 windows take too long", "a smaller image or batch")]
        return ()

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        (B, H, W), wide = qkv.shape[:3], torch.promote_types(qkv.dtype, torch.float32)
        rows, *_ = groups_and_tokens(H, problem.window[0], problem.axis, qkv.device)
        columns, *_ = groups_and_tokens(W, problem.window[1], problem.axis, qkv.device)
        table = None if bias is None else bias.to(wide)
        out = torch.zeros(qkv[:, :, :, 0].shape, dtype=wide, device=qkv.device)
        for image in range(B):
            for y, x in (torch.meshgrid(row, column, indexing="ij") for row in rows for column in columns):
                there = ((y < H) & (x < W)).flatten()
                pixels = torch.full_like(y, image).flatten()[there], y.flatten()[there], x.flatten()[there]
                q, k, v = qkv[pixels].to(wide).permute(1, 2, 0, 3)
                logits = q @ k.transpose(-2, -1) * problem.softmax_scale
                logits = logits if table is None else logits + table[:, there][:, :, there]
                out = out.index_put(pixels, (logits.softmax(-1) @ v).transpose(0, 1))
        out = out if B else out + qkv.sum()
        return with_empty_batch(out.to(qkv.dtype), bias, problem)


class CounterDropout(Explicit):
    """Dropout by a hash of the weight's number and a seed: only the seed is kept for the backward pass."""

    name = "counter_dropout"

    def draw(self, weights: Tensor, dropout_p: float) -> Tensor | None:
        return torch.randint(2**31, (), device=weights.device) if dropout_p else None

    def factors(self, drawn: Tensor, weights: Tensor, dropout_p: float) -> Tensor:
        number = torch.arange(weights.numel(), device=weights.device).view(weights.shape)
        for odd in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):
            number = ((number + drawn) * odd) % 2**32
            number = number ^ (number >> 15)
        return (number >= dropout_p * 2**32).to(weights.dtype) / (1 - dropout_p)


class FlashRounding(Explicit):
    """Weights and the logits' gradient are rounded to the dtype of qkv for products; delta is of the rounded output."""

    name = "flash_rounding"

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return super().values(weights.to(problem.dtype).to(v.dtype), v, problem)

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        ctx.save_for_backward(qkv, bias, drawn, out)

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        qkv, bias, drawn, out = ctx.saved_tensors
        for_this, wide = copy(self), torch.promote_types(grad_out.dtype, torch.float32)
        inside = self.inside_windows(*grad_out.shape[1:3], ctx.problem, grad_out.device)
        delta = (out.to(wide) * grad_out.to(wide)).sum(-1, keepdim=True)
        for_this.delta = self.incoming(delta, inside, ctx.problem)
        with torch.autocast(grad_out.device.type, enabled=False):
            return for_this.gradients(qkv, bias, drawn, grad_out, ctx.problem)

    def logits_gradient(self, weights: Tensor, grad_weights: Tensor) -> Tensor:
        return weights * (grad_weights - self.delta)

    def q_gradient(self, grad_logits: Tensor, k: Tensor, problem: Problem) -> Tensor:
        return super().q_gradient(grad_logits.to(problem.dtype).to(k.dtype), k, problem)

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        return super().k_gradient(grad_logits.to(problem.dtype).to(q.dtype), q, problem)

    def v_gradient(self, weights: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        return super().v_gradient(weights.to(problem.dtype).to(grad_out.dtype), grad_out, problem)


class TwiceDifferentiable(Explicit):
    """A backward pass of differentiable operations on the inputs themselves, so that it can be differentiated."""

    name = "twice_differentiable"
    capabilities = Capabilities(double_backward=True, **EAGER)

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return _Twice.apply(qkv, bias, problem, self)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, problem: Problem, backend: Explicit) -> Tensor:
        return Attention.forward(ctx, qkv, bias, problem, backend)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.backend.backward(ctx, grad_out), None, None)


class AnotherLibrary(Windows):
    """NumPy, which knows no autograd and no 16 bits."""

    name = "another_library"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32, torch.float64}), dropout=False, **EAGER
    )

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return _NumPy.apply(q, k, v, bias, problem.softmax_scale)


class _NumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, bias)
        return torch.from_numpy(_weights(q, k, bias, scale) @ v.numpy())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, bias), g = ctx.saved_tensors, grad_out.numpy()
        weights = _weights(q, k, bias, ctx.scale)
        grad_weights = g @ v.numpy().swapaxes(-2, -1)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdims=True))
        grad_q = grad_logits @ k.numpy() * ctx.scale
        grad_k = grad_logits.swapaxes(-2, -1) @ q.numpy() * ctx.scale
        grad_bias = None if bias is None else torch.from_numpy(grad_logits.sum(0))
        return *map(torch.from_numpy, (grad_q, grad_k, weights.swapaxes(-2, -1) @ g)), grad_bias, None


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> np.ndarray:
    logits = q.numpy() @ k.numpy().swapaxes(-2, -1) * np.asarray(scale, q.numpy().dtype)
    logits = logits if bias is None else logits + bias.numpy()
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(-1, keepdims=True)


class Lifted(Backend):
    """The bias as more dims of q and k, for kernels without one: `[q, I] [k, bias^T / scale]^T scale`."""

    name = "lifted"
    capabilities = Capabilities(window_tokens=(1, 240), dtypes=frozenset({torch.bfloat16, torch.float32}), **EAGER)

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if problem.bias is not None and problem.tokens + problem.head_dim > 256:
            return [Reason("lift", f"{problem.tokens} tokens and {problem.head_dim} dims exceed 256 together")]
        if problem.bias is not None and problem.scale is not None and abs(problem.scale) < 1e-3:
            return [Reason("scale", "a bias cannot be divided by a scale of 0", "a larger scale")]
        return ()

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        scale = problem.softmax_scale

        def attend_windows(tokens: Tensor, corner: Tensor | None) -> Tensor:
            q, k, v = tokens.permute(2, 0, 3, 1, 4)
            if corner is not None:
                N = corner.shape[-1]
                lift = torch.eye(N, dtype=q.dtype, device=q.device).expand(*q.shape[:3], N)
                lifted = (corner / scale).transpose(1, 2).to(q.dtype).expand(*q.shape[:3], N)
                q, k = torch.cat((q, lift), -1), torch.cat((k, lifted), -1)
            return F.scaled_dot_product_attention(q, k, v, None, problem.dropout_p, scale=scale).transpose(1, 2)

        table = None if bias is None else bias.float()
        out = windows.for_each_size(qkv, table, problem.window, problem.axis, attend_windows)
        return with_empty_batch(out, bias, problem)


class CachedMaps(Steps):
    """Index maps are cached by all that they depend on, and made outside of inference mode."""

    name = "cached_maps"
    capabilities = Capabilities(**EAGER)

    def __init__(self) -> None:
        self.maps: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        key = size, window, axis, device
        if key not in self.maps:
            with torch.inference_mode(False):
                self.maps[key] = super().index_map(*key)
        return self.maps[key]


CORRECT = {
    backend.name: backend
    for backend in (
        Naive(),
        Steps(),
        Operators(),
        OnlineSoftmax(),
        BaseTwo(),
        BiasInTheDtypeOfQkv(),
        PaddedAndMasked(),
        WindowByWindow(),
        CounterDropout(),
        FlashRounding(),
        TwiceDifferentiable(),
        AnotherLibrary(),
        Lifted(),
        CachedMaps(),
        *LIMITED,
    )
}
