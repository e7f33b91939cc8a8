"""The calls of each generation, on packed `(windows, tokens, 3, heads, head_dim)`."""

from __future__ import annotations

from torch import Tensor


def call(generation: int, qkv: Tensor, scale: float, dropout_p: float, deterministic: bool) -> Tensor:
    """Attention without a bias by flash-attn 2, 3 or 4: `(windows, tokens, heads, head_dim)`.

    The packed functions of 2 and 3 write the gradient of qkv as one tensor; 4 has none.
    """
    if generation == 2:
        from flash_attn import flash_attn_qkvpacked_func

        return _output(flash_attn_qkvpacked_func(qkv, dropout_p, softmax_scale=scale, deterministic=deterministic))
    if generation == 3:
        from flash_attn_interface import flash_attn_qkvpacked_func as packed

        return _output(packed(qkv, softmax_scale=scale, deterministic=deterministic))
    from flash_attn.cute import flash_attn_func

    return _output(flash_attn_func(*qkv.unbind(2), softmax_scale=scale, deterministic=deterministic))


def _output(given: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output, which some versions give together with the log-sum-exp."""
    return given[0] if isinstance(given, tuple) else given
