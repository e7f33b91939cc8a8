"""The lift: a relative position bias for kernels that take none, as further channels of q and k.

With `q' = [q, c I]` and `k' = [k, bias^T / (c scale)]` a kernel's `scale * q' k'^T` is `scale * q k^T + bias`, and
autograd finds the gradient of the bias in that of k'. `c` is the power of two nearest to `1 / scale`, so that q, k and
`c I` are what they were in every dtype, and only the bias is rounded. Held in two terms, `bias = high + low`, it has
twice the digits of the dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_EXPONENT = 14
"""Powers of two up to this, and down to minus this, are normal numbers in every dtype."""

SMALLEST_SCALE = 2.0**-20
"""With smaller ones, other than 0, a bias of usual size would be cut off in fp16."""

INFINITY = 1e30
"""Hides a key as infinity does, but leaves every logit a finite number in fp32."""


def lift(qkv: Tensor, bias: Tensor, scale: float, head_dim: int, terms: int) -> Tensor:
    """`qkv (windows, tokens, 3, heads, d)` widened to `head_dim`, at least `d + terms * tokens`, with the bias in it.

    `bias` is `(heads, tokens, tokens)`, in fp32 or finer, and `scale` above 0. A bias beyond what the dtype of `qkv`
    can hold, or 1e30, is cut off there, so that one of minus infinity hides a key.

    Example:
        >>> qkv, bias = torch.randn(2, 3, 3, 1, 4), torch.randn(1, 3, 3)
        >>> q, k, _ = lift(qkv, bias, 0.5, head_dim=8, terms=1).permute(2, 0, 3, 1, 4)
        >>> plain_q, plain_k, _ = qkv.permute(2, 0, 3, 1, 4)
        >>> torch.allclose(0.5 * q @ k.mT, 0.5 * plain_q @ plain_k.mT + bias, atol=1e-5)
        True
    """
    windows, tokens, _, heads, d = qkv.shape
    exponent = max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, -round(math.log2(scale))))
    largest = min(torch.finfo(qkv.dtype).max, INFINITY)
    of_bias = split((bias / (2.0**exponent * scale)).clamp(-largest, largest), qkv.dtype, terms)
    one_hot = torch.eye(tokens, dtype=qkv.dtype, device=qkv.device) * 2.0**exponent
    q = one_hot.repeat(1, terms)[:, None].expand(-1, heads, -1)
    k = torch.cat([term.permute(2, 0, 1) for term in of_bias], -1)
    channels = F.pad(torch.stack([q, k, torch.zeros_like(k)], 1), (0, head_dim - d - terms * tokens))
    return torch.cat([qkv, channels.expand(windows, -1, -1, -1, -1)], -1)


def split(x: Tensor, dtype: torch.dtype, terms: int) -> list[Tensor]:
    """`x` in `dtype`, and with two terms also what that leaves of it; the gradient is that of the first.

    Example:
        >>> [term.item() for term in split(torch.tensor(1.0 + 2**-10), torch.bfloat16, 2)]
        [1.0, 0.0009765625]
    """
    high = x.to(dtype)
    return [high] if terms == 1 else [high, (x - high).detach().to(dtype)]
