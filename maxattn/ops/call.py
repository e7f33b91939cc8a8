"""One call of `max_sa` as plain facts: what is checked, what the choice is cached by, what a `Problem` is made of."""

from __future__ import annotations

import math
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Axis, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Call(NamedTuple):
    """The facts of a call; sizes are None where a compiler holds them as symbols."""

    shape: tuple[int | None, ...]
    last_stride: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    bias_shape: tuple[int, ...] | None
    bias_dtype: torch.dtype | None
    bias_device: torch.device | None
    bias_requires_grad: bool
    axis: Axis
    window: tuple[int, int]
    scale: float | None
    dropout_p: float
    deterministic: bool


def check_types(qkv: object, axis: object, bias: object, scale: object, dropout_p: object, backend: object) -> None:
    """Raise TypeError for arguments that cannot be described, nor be the key of a cache."""
    _require("qkv", qkv, (Tensor,), "a torch.Tensor")
    _require("bias", bias, (Tensor, NoneType), "a torch.Tensor or None")
    _require("backend", backend, (str, NoneType), "a name, a comma list of names, or None")
    _check_scalar_types(axis, scale, dropout_p)


def describe(
    qkv: Tensor,
    axis: Axis,
    window: int | tuple[int, int],
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Call:
    """The facts of a call with these arguments, not yet checked."""
    grad = torch.is_grad_enabled()
    return Call(
        qkv.shape,
        qkv.stride(-1) if qkv.ndim else 0,
        qkv.dtype,
        qkv.device,
        grad and qkv.requires_grad,
        None if bias is None else bias.shape,
        None if bias is None else bias.dtype,
        None if bias is None else bias.device,
        bias is not None and grad and bias.requires_grad,
        axis,
        window_pair(window),
        scale,
        dropout_p,
        torch.are_deterministic_algorithms_enabled(),
    )


def problem_of(
    call: Call, compute_capability: tuple[int, int] | None, *, compiling: bool = False, exporting: bool = False
) -> Problem:
    """The `Problem` that a checked call poses."""
    batch, height, width, _, heads, head_dim = call.shape
    return Problem(
        axis=call.axis,
        window=call.window,
        batch=batch,
        height=height,
        width=width,
        heads=heads,  # type: ignore[arg-type]  # only the first three may be None
        head_dim=head_dim,  # type: ignore[arg-type]
        dtype=call.dtype,
        device=call.device.type,
        compute_capability=compute_capability,
        bias=call.bias_dtype,
        requires_grad=call.requires_grad,
        bias_requires_grad=call.bias_requires_grad,
        scale=call.scale,
        dropout_p=call.dropout_p,
        deterministic=call.deterministic,
        compiling=compiling,
        exporting=exporting,
    )


def check(call: Call) -> None:
    """Raise ValueError or TypeError for a call that no backend could serve."""
    _check_scalar_types(call.axis, call.scale, call.dropout_p)
    shape = call.shape
    if len(shape) != 6 or shape[3] != 3:
        raise ValueError(f"qkv must be (B, H, W, 3, heads, head_dim), not {_show(shape)}{_shape_hint(shape)}")
    for name, size in zip(("H", "W", "heads", "head_dim"), (*shape[1:3], *shape[4:]), strict=True):
        if size == 0:
            raise ValueError(f"qkv (B, H, W, 3, heads, head_dim) has {name} 0: {_show(shape)}; only B may be 0")
    if call.dtype not in DTYPES:
        raise TypeError(f"qkv must be float16, bfloat16, float32 or float64, not {call.dtype}")
    if call.last_stride != 1 and shape[5] != 1 and shape[0] != 0:
        raise ValueError(f"the last stride of qkv must be 1, not {call.last_stride}: call qkv.contiguous() first")
    check_groups(call.axis, call.window)
    P_h, P_w = call.window
    if call.bias_shape is not None:
        expected = (shape[4], P_h * P_w, P_h * P_w)
        if call.bias_shape != expected:
            raise ValueError(
                f"bias must be (heads, N, N) = {_show(expected)} for {shape[4]} heads and a {P_h} x {P_w} window, "
                f"not {_show(call.bias_shape)}"
            )
        if call.bias_dtype not in DTYPES:
            raise TypeError(f"bias must be float16, bfloat16, float32 or float64, not {call.bias_dtype}")
        if call.bias_device != call.device:
            raise ValueError(f"qkv is on {call.device} but bias on {call.bias_device}: move one of them")
    if call.scale is not None and not isinstance(call.scale, (float, int)):
        raise TypeError(f"scale must be a number or None, not {type(call.scale).__name__}")
    if call.scale is not None and not math.isfinite(call.scale):
        raise ValueError(f"scale must be a finite number or None, not {call.scale}")
    if not 0.0 <= call.dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, not {call.dropout_p}")


def check_groups(axis: str, window: tuple[int, int]) -> None:
    """Raise ValueError for an axis that there is not, or a window without tokens."""
    if axis not in ("block", "grid"):
        raise ValueError(f"axis must be 'block' or 'grid', not {axis!r}")
    if min(window) < 1:
        raise ValueError(f"window must be at least 1 x 1 token, not {window[0]} x {window[1]}")


def window_pair(window: int | tuple[int, int]) -> tuple[int, int]:
    """`(P_h, P_w)` of an int, which means square, or of two; a ValueError for anything else."""
    if type(window) is int:
        return window, window
    if isinstance(window, (tuple, list)) and len(window) == 2 and type(window[0]) is type(window[1]) is int:
        return window[0], window[1]
    raise ValueError(f"window must be an int or two ints (P_h, P_w), not {window!r}")


def _check_scalar_types(axis: object, scale: object, dropout_p: object) -> None:
    _require("axis", axis, (str,), "'block' or 'grid'")
    _require("scale", scale, (float, int, NoneType), "a number or None")
    _require("dropout_p", dropout_p, (float, int), "a number")


def _require(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")


def _show(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _shape_hint(shape: tuple[int | None, ...]) -> str:
    """What would turn a likely mistake into a packed qkv."""
    if len(shape) == 4 and shape[3] is not None and shape[3] % 3 == 0:
        return "; for the output of a Linear on NHWC call qkv.unflatten(-1, (3, heads, head_dim))"
    if len(shape) == 6 and shape[4] == 3:
        return "; heads come after the 3: call qkv.transpose(3, 4)"
    return ""
