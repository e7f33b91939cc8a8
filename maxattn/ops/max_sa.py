"""`max_sa`: check the arguments and choose a backend, both once per kind of call; then call it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from maxattn.ops import dispatch, registry
from maxattn.ops.contract import Axis, Backend, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTOCAST_DEVICES = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


class Plan(NamedTuple):
    """All that was decided about one kind of call."""

    backend: Backend
    problem: Problem


def max_sa(
    qkv: Tensor,
    axis: Axis = "block",
    window: int | tuple[int, int] = (7, 7),
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Multi-axis self-attention on the image (MaxViT paper, section 3.2): within local blocks, or over a dilated grid.

    With `n_h = ceil(H / P_h)` groups along the height (likewise the width), token `i` of group `a` is row
    `a * P_h + i` for `axis="block"` and row `i * n_h + a` for `axis="grid"`. Rows and columns outside the image do
    not exist: any H x W is served, and none is padded. Softmax and sums run in fp32 (fp64 for fp64 input), under
    autocast too: the dtype of `qkv` alone decides.

    Args:
        qkv: `(B, H, W, 3, heads, head_dim)`, packed as a Linear on NHWC leaves it; the last stride must be 1.
        axis: "block" or "grid".
        window: tokens per group, `(P_h, P_w)`: the block size, or the grid size. An int means square.
        bias: `(heads, N, N)` with `N = P_h * P_w`, added to the scaled logits, query first. None for none.
        scale: factor on `q k^T`; `head_dim ** -0.5` by default.
        dropout_p: probability of dropping an attention weight; applied whenever it is not 0.
        backend: a name, or a comma list in order of preference, that must be used. By default the one of
            `use_backend`, else of `MAXATTN_BACKEND`, else the fastest able one.

    Returns:
        `(B, H, W, heads, head_dim)`, contiguous, in the dtype of `qkv`.

    Raises:
        ValueError: for a wrong shape, axis, window, scale, dropout_p or stride.
        TypeError: for a wrong type or dtype.
        BackendUnavailableError: if what was forced cannot serve this call, with the reasons.

    Example:
        >>> import torch, maxattn
        >>> qkv = torch.randn(1, 10, 13, 3, 2, 16)
        >>> maxattn.max_sa(qkv, axis="grid", window=7).shape
        torch.Size([1, 10, 13, 2, 16])
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a torch.Tensor, not {type(qkv).__name__}")
    if torch.compiler.is_compiling():
        return _traced(qkv, axis, window, bias, scale, dropout_p, backend)
    plan = _plan(
        qkv.shape,
        None if bias is None else bias.shape,
        qkv.stride(-1) if qkv.ndim else 0,
        *_facts(qkv, bias),
        axis,
        tuple(window) if isinstance(window, list) else window,
        scale,
        dropout_p,
        backend,
        *dispatch.eager_override(),
    )
    return _execute(plan.backend, qkv, bias, plan.problem)


def explain(
    qkv: Tensor | Problem,
    axis: Axis = "block",
    window: int | tuple[int, int] = (7, 7),
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Which backend `max_sa` would use for these arguments, and what every backend says to them; computes nothing.

    Takes the arguments of `max_sa`, or one `Problem` in place of all but `backend`. Print the result to read it.

    Raises:
        ValueError, TypeError: as `max_sa` does for the same arguments.

    Example:
        >>> import torch, maxattn
        >>> explanation = maxattn.explain(torch.randn(1, 8, 8, 3, 2, 16), axis="grid", window=4)
        >>> explanation.backend, explanation.asked_by
        ('sdpa', 'automatic')
    """
    if isinstance(qkv, Problem):
        return dispatch.explain_problem(qkv, backend)
    facts = _facts(qkv, bias)
    bias_shape = None if bias is None else bias.shape
    _check(qkv.shape, bias_shape, qkv.stride(-1) if qkv.ndim else 0, *facts[:4], axis, window, scale, dropout_p)
    capability = dispatch.compute_capability(qkv.device)
    problem = _problem(qkv.shape, *facts, axis, window, scale, dropout_p, capability)
    return dispatch.explain_problem(problem, backend)


def _facts(qkv: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """What the choice depends on besides shapes and arguments: (dtype, device) twice, gradients, determinism."""
    grad = torch.is_grad_enabled()
    if bias is None:
        bias_dtype, bias_device, bias_grad = None, None, False
    else:
        bias_dtype, bias_device, bias_grad = bias.dtype, bias.device, grad and bias.requires_grad
    deterministic = torch.are_deterministic_algorithms_enabled()
    return qkv.dtype, qkv.device, bias_dtype, bias_device, grad and qkv.requires_grad, bias_grad, deterministic


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    last_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    bias_dtype: torch.dtype | None,
    bias_device: torch.device | None,
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
    axis: Axis,
    window: int | tuple[int, int],
    scale: float | None,
    dropout_p: float,
    backend: str | None,
    context: str | None,
    environment: str | None,
) -> Plan:
    _check(shape, bias_shape, last_stride, dtype, device, bias_dtype, bias_device, axis, window, scale, dropout_p)
    gradients = requires_grad, bias_requires_grad, deterministic
    capability = dispatch.compute_capability(device)
    problem = _problem(
        shape, dtype, device, bias_dtype, bias_device, *gradients, axis, window, scale, dropout_p, capability
    )
    return Plan(dispatch.choose(problem, backend, context, environment), problem)


registry.on_change(_plan.cache_clear)


def _problem(
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
    bias_dtype: torch.dtype | None,
    bias_device: torch.device | None,
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
    axis: Axis,
    window: int | tuple[int, int],
    scale: float | None,
    dropout_p: float,
    capability: tuple[int, int] | None,
) -> Problem:
    batch, height, width, _, heads, head_dim = shape
    return Problem(
        axis=axis,
        window=_pair(window),
        batch=batch,
        height=height,
        width=width,
        heads=heads,  # type: ignore[arg-type]  # only the first three may be None
        head_dim=head_dim,  # type: ignore[arg-type]
        dtype=dtype,
        device=device.type,
        compute_capability=capability,
        bias=bias_dtype,
        requires_grad=requires_grad,
        bias_requires_grad=bias_requires_grad,
        scale=scale,
        dropout_p=dropout_p,
        deterministic=deterministic,
        compiling=torch.compiler.is_compiling(),
        exporting=torch.compiler.is_exporting(),
    )


def _traced(
    qkv: Tensor,
    axis: Axis,
    window: int | tuple[int, int],
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    """As `max_sa` while a compiler traces: the choice becomes a constant, the chosen backend's code is traced."""
    sizes = tuple(size if has_static_value(size) else None for size in qkv.shape[:3])
    shape = (*sizes, *(index(size) for size in qkv.shape[3:]))
    bias_shape = None if bias is None else tuple(index(size) for size in bias.shape)
    facts, exporting = _facts(qkv, bias), torch.compiler.is_exporting()
    # The compiler may hold a float as a symbol, so the choice is told only that there is dropout, not how much.
    some_dropout = 0.5 if dropout_p > 0 else 0.0
    name, capability = _choose_constant(
        shape, bias_shape, *facts, axis, window, some_dropout, backend, dispatch.traced_override(), exporting
    )
    problem = _problem(shape, *facts, axis, window, scale, dropout_p, capability)
    return _execute(registry.BACKENDS[name], qkv, bias, problem)


@torch.compiler.assume_constant_result
def _choose_constant(
    shape: tuple[int | None, ...],
    bias_shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
    bias_dtype: torch.dtype | None,
    bias_device: torch.device | None,
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
    axis: Axis,
    window: int | tuple[int, int],
    dropout_p: float,
    backend: str | None,
    context: str | None,
    exporting: bool,
) -> tuple[str, tuple[int, int] | None]:
    _check(shape, bias_shape, 1, dtype, device, bias_dtype, bias_device, axis, window, None, dropout_p)
    gradients = requires_grad, bias_requires_grad, deterministic
    capability = dispatch.compute_capability(device)
    problem = _problem(
        shape, dtype, device, bias_dtype, bias_device, *gradients, axis, window, None, dropout_p, capability
    )
    problem = replace(problem, compiling=True, exporting=exporting)
    return dispatch.choose(problem, backend, context, dispatch.eager_override()[1]).name, capability


def _execute(backend: Backend, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    if problem.device in AUTOCAST_DEVICES and torch.is_autocast_enabled(problem.device):
        with torch.autocast(problem.device, enabled=False):
            return backend.attend(qkv, bias, problem)
    return backend.attend(qkv, bias, problem)


def _check(
    shape: tuple[int | None, ...],
    bias_shape: tuple[int, ...] | None,
    last_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    bias_dtype: torch.dtype | None,
    bias_device: torch.device | None,
    axis: Axis,
    window: int | tuple[int, int],
    scale: float | None,
    dropout_p: float,
) -> None:
    """Raise ValueError or TypeError for arguments of `max_sa` that no backend could serve."""
    if len(shape) != 6 or shape[3] != 3:
        raise ValueError(f"qkv must be (B, H, W, 3, heads, head_dim), not {_show(shape)}{_shape_hint(shape)}")
    for name, size in zip(("H", "W", "heads", "head_dim"), (*shape[1:3], *shape[4:]), strict=True):
        if size == 0:
            raise ValueError(f"qkv (B, H, W, 3, heads, head_dim) has {name} 0: {_show(shape)}; only B may be 0")
    if dtype not in DTYPES:
        raise TypeError(f"qkv must be float16, bfloat16, float32 or float64, not {dtype}")
    if last_stride != 1 and shape[5] != 1 and shape[0] != 0:
        raise ValueError(f"the last stride of qkv must be 1, not {last_stride}: call qkv.contiguous() first")
    if axis not in ("block", "grid"):
        raise ValueError(f"axis must be 'block' or 'grid', not {axis!r}")
    P_h, P_w = _pair(window)
    if P_h < 1 or P_w < 1:
        raise ValueError(f"window must be at least 1 x 1 token, not {P_h} x {P_w}")
    if bias_shape is not None:
        N = P_h * P_w
        expected = (shape[4], N, N)
        if bias_shape != expected:
            raise ValueError(
                f"bias must be (heads, N, N) = {_show(expected)} for {shape[4]} heads and a {P_h} x {P_w} window, "
                f"not {_show(bias_shape)}"
            )
        if bias_dtype not in DTYPES:
            raise TypeError(f"bias must be float16, bfloat16, float32 or float64, not {bias_dtype}")
        if bias_device != device:
            raise ValueError(f"qkv is on {device} but bias on {bias_device}: move one of them")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None, not {scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, not {dropout_p}")


def _pair(window: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(window, int) and not isinstance(window, bool):
        return window, window
    if isinstance(window, (tuple, list)) and len(window) == 2 and all(type(side) is int for side in window):
        return window[0], window[1]
    raise ValueError(f"window must be an int or two ints (P_h, P_w), not {window!r}")


def _show(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _shape_hint(shape: tuple[int | None, ...]) -> str:
    """What would turn a likely mistake into a packed qkv."""
    if len(shape) == 4 and shape[3] is not None and shape[3] % 3 == 0:
        return "; for the output of a Linear on NHWC call qkv.unflatten(-1, (3, heads, head_dim))"
    if len(shape) == 6 and shape[4] == 3:
        return "; heads come after the 3: call qkv.transpose(3, 4)"
    return ""
