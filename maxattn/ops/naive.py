"""`naive`, the specification: Max-SA written down literally. Every other backend is tested against it in fp64.

Shapes: B batch, H x W pixels, h heads, d head_dim, G groups (windows) of N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maxattn.ops.contract import Axis, Backend, Capabilities, Problem


def groups_and_tokens(size: int, window: int, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The index map along one side of the image, and its inverse (MaxViT paper, section 3.2).

    Returns `pixel (n, window)`, the pixel of each token of each group, which may lie outside `0 .. size - 1`, and
    `group (size)` and `token (size)`, where each pixel went.

    Example:
        >>> groups_and_tokens(4, 2, "block", "cpu")[0].tolist()
        [[0, 1], [2, 3]]
        >>> groups_and_tokens(4, 2, "grid", "cpu")[0].tolist()
        [[0, 2], [1, 3]]
    """
    n = (size + window - 1) // window
    a, i = torch.arange(n, device=device)[:, None], torch.arange(window, device=device)[None, :]
    p = torch.arange(size, device=device)
    if axis == "block":
        return a * window + i, p // window, p % window
    return i * n + a, p % n, p // n


class Naive(Backend):
    """Gather each group's tokens, attend among those inside the image, put each pixel's result back."""

    name = "naive"
    capabilities = Capabilities(double_backward=True)

    def relative_speed(self, problem: Problem) -> float:
        return 0.5

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        B, H, W, _, h, d = qkv.shape
        (P_h, P_w), axis = problem.window, problem.axis
        y, y_group, y_token = groups_and_tokens(H, P_h, axis, qkv.device)
        x, x_group, x_token = groups_and_tokens(W, P_w, axis, qkv.device)
        n_h, n_w, G, N = y.shape[0], x.shape[0], y.shape[0] * x.shape[0], P_h * P_w

        inside_GN = ((y < H)[:, None, :, None] & (x < W)[None, :, None, :]).reshape(G, N)
        pixel_GN = (y.clamp(max=H - 1)[:, None, :, None] * W + x.clamp(max=W - 1)[None, :, None, :]).reshape(G, N)
        qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).reshape(B, H * W, 3, h, d)
        tokens = qkv[:, pixel_GN].masked_fill(~inside_GN[:, :, None, None, None], 0.0)
        q, k, v = tokens.permute(3, 0, 1, 4, 2, 5)  # each (B, G, h, N, d)

        logits = q @ k.transpose(-2, -1) * problem.softmax_scale
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        logits = logits.masked_fill(~inside_GN[:, None, None, :], float("-inf"))
        weights = self.drop(logits.softmax(-1), problem)
        out = (weights @ v).transpose(2, 3).reshape(B, n_h, n_w, P_h, P_w, h, d)

        out = out[:, y_group[:, None], x_group[None, :], y_token[:, None], x_token[None, :]]
        return out.to(problem.dtype).contiguous()

    def drop(self, weights: Tensor, problem: Problem) -> Tensor:
        """Dropout of attention weights `(B, G, h, N, N)`; a method, so that a test can say which are dropped."""
        return F.dropout(weights, problem.dropout_p)
