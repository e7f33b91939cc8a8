"""`naive` again in steps that a mutant may change, forward and with its gradients written out.

Shapes: B batch, H x W pixels, h heads, d head_dim, G groups (windows) of N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from maxattn import Backend, Capabilities, Problem
from maxattn.ops.naive import groups_and_tokens


class Steps(Backend):
    """Right, and differentiated by autograd: each method is a step."""

    name = "steps"
    capabilities = Capabilities(compile=False, export=False)

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """As `groups_and_tokens`."""
        return groups_and_tokens(size, window, axis, device)

    def image_maps(self, H: int, W: int, problem: Problem, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
        """The index maps along both sides."""
        rows = self.index_map(H, problem.window[0], problem.axis, device)
        return rows, self.index_map(W, problem.window[1], problem.axis, device)

    def inside(self, y: Tensor, x: Tensor, H: int, W: int) -> Tensor:
        """`(G, N)`: whether the token is a pixel of the image."""
        return ((y < H)[:, None, :, None] & (x < W)[None, :, None, :]).flatten(2).flatten(0, 1)

    def to_windows(self, image: Tensor, problem: Problem) -> Tensor:
        """`image (B, H, W, ...)` to `(B, G, N, ...)`, with some pixel or other where there is none."""
        B, H, W = image.shape[:3]
        (y, *_), (x, *_) = self.image_maps(H, W, problem, image.device)
        pixel_GN = y.clamp(0, H - 1)[:, None, :, None] * W + x.clamp(0, W - 1)[None, :, None, :]
        return image.reshape(B, H * W, *image.shape[3:])[:, pixel_GN.flatten(2).flatten(0, 1)]

    def to_image(self, windows: Tensor, H: int, W: int, problem: Problem) -> Tensor:
        """The inverse of `to_windows`."""
        (y, y_group, y_token), (x, x_group, x_token) = self.image_maps(H, W, problem, windows.device)
        windows = windows.unflatten(2, problem.window).unflatten(1, (y.shape[0], x.shape[0]))
        return windows[:, y_group[:, None], x_group[None, :], y_token[:, None], x_token[None, :]]

    def inside_windows(self, H: int, W: int, problem: Problem, device: torch.device) -> Tensor:
        (y, *_), (x, *_) = self.image_maps(H, W, problem, device)
        return self.inside(y, x, H, W)

    def qkv_windows(self, qkv: Tensor, problem: Problem) -> Tensor:
        """q, k and v, each `(B, G, h, N, d)`, in the dtype of the computation."""
        inside = self.inside_windows(*qkv.shape[1:3], problem, qkv.device)
        windows = self.to_windows(qkv.to(torch.promote_types(qkv.dtype, torch.float32)), problem)
        return self.filled(windows, inside).permute(3, 0, 1, 4, 2, 5)

    def filled(self, windows: Tensor, inside: Tensor) -> Tensor:
        """`windows (B, G, N, ...)`, 0 for tokens that do not exist."""
        return windows.masked_fill(~inside.view(*inside.shape, *[1] * (windows.ndim - 3)), 0.0)

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        logits = q @ k.transpose(-2, -1) * problem.softmax_scale
        return logits if bias is None else logits + bias.to(logits.dtype)

    def masked(self, logits: Tensor, inside: Tensor) -> Tensor:
        return logits.masked_fill(~inside[:, None, None, :], float("-inf"))

    def softmax(self, logits: Tensor, problem: Problem) -> Tensor:
        return logits.softmax(-1)

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return F.dropout(weights, dropout_p)

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return weights @ v

    def result(self, out: Tensor, problem: Problem) -> Tensor:
        """`out (B, H, W, h, d)` as it is returned."""
        return out.to(problem.dtype).contiguous()

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        H, W = qkv.shape[1:3]
        inside = self.inside_windows(H, W, problem, qkv.device)
        q, k, v = self.qkv_windows(qkv, problem)
        weights = self.softmax(self.masked(self.logits(q, k, bias, problem), inside), problem)
        out = self.values(self.dropped(weights, problem.dropout_p), v, problem).transpose(2, 3)
        return self.result(self.to_image(out, H, W, problem), problem)


class Explicit(Steps):
    """Right, with the backward pass of a fused kernel: weights are computed again, each gradient is a step."""

    name = "explicit"

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return Attention.apply(qkv, bias, problem, self)

    def save(self, ctx: Any, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, out: Tensor) -> None:
        ctx.save_for_backward(qkv, bias, drawn)

    def saved(self, ctx: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return ctx.saved_tensors

    def draw(self, weights: Tensor, dropout_p: float) -> Tensor | None:
        """What is kept of dropout for the backward pass: the factors themselves."""
        return F.dropout(torch.ones_like(weights), dropout_p) if dropout_p else None

    def factors(self, drawn: Tensor, weights: Tensor, dropout_p: float) -> Tensor:
        """What dropout multiplies the weights by."""
        return drawn

    def recomputed_weights(self, q: Tensor, k: Tensor, bias: Tensor | None, inside: Tensor, problem: Problem) -> Tensor:
        return self.softmax(self.masked(self.logits(q, k, bias, problem), inside), problem)

    def incoming(self, grad_out: Tensor, inside: Tensor, problem: Problem) -> Tensor:
        """The gradient of the output, `(B, G, h, N, d)`, 0 for tokens that do not exist."""
        grad_out = self.to_windows(grad_out.to(torch.promote_types(grad_out.dtype, torch.float32)), problem)
        return self.filled(grad_out, inside).transpose(2, 3)

    def logits_gradient(self, weights: Tensor, grad_weights: Tensor) -> Tensor:
        return weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))

    def q_gradient(self, grad_logits: Tensor, k: Tensor, problem: Problem) -> Tensor:
        return grad_logits @ k * problem.softmax_scale

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        return grad_logits.transpose(-2, -1) @ q * problem.softmax_scale

    def v_gradient(self, weights: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        return weights.transpose(-2, -1) @ grad_out

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        """`(B, G, h, N, N)` to `(h, N, N)`."""
        return grad_logits.sum((0, 1))

    def gradients(
        self, qkv: Tensor, bias: Tensor | None, drawn: Tensor | None, grad_out: Tensor, problem: Problem
    ) -> tuple[Tensor | None, Tensor | None]:
        H, W = qkv.shape[1:3]
        inside = self.inside_windows(H, W, problem, qkv.device)
        q, k, v = self.qkv_windows(qkv, problem)
        grad_out = self.incoming(grad_out, inside, problem)
        weights = self.recomputed_weights(q, k, bias, inside, problem)
        grad_weights = grad_out @ v.transpose(-2, -1)
        dropped = weights
        if drawn is not None:
            factors = self.factors(drawn, weights, problem.dropout_p)
            dropped, grad_weights = weights * factors, grad_weights * factors
        grad_logits = self.logits_gradient(weights, grad_weights)
        parts = (
            self.q_gradient(grad_logits, k, problem),
            self.k_gradient(grad_logits, q, problem),
            self.v_gradient(dropped, grad_out, problem),
        )
        packed = torch.stack(parts, 0).permute(1, 2, 4, 0, 3, 5)
        grad_qkv = self.to_image(packed, H, W, problem).to(qkv.dtype)
        return grad_qkv, None if bias is None else self.bias_gradient(grad_logits, problem).to(bias.dtype)

    def backward(self, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return self.gradients(*self.saved(ctx), grad_out, ctx.problem)


class Attention(torch.autograd.Function):
    """What joins the two passes of a backend."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, problem: Problem, backend: Explicit) -> Tensor:
        H, W = qkv.shape[1:3]
        inside = backend.inside_windows(H, W, problem, qkv.device)
        q, k, v = backend.qkv_windows(qkv, problem)
        weights = backend.softmax(backend.masked(backend.logits(q, k, bias, problem), inside), problem)
        drawn = backend.draw(weights, problem.dropout_p)
        dropped = weights if drawn is None else weights * backend.factors(drawn, weights, problem.dropout_p)
        out = backend.values(dropped, v, problem).transpose(2, 3)
        out = backend.result(backend.to_image(out, H, W, problem), problem)
        ctx.problem, ctx.backend = problem, backend
        backend.save(ctx, qkv, bias, drawn, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.backend.backward(ctx, grad_out), None, None)
