"""`max_sa`: check the arguments and choose a backend, both once per kind of call; then call it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from maxattn.ops import dispatch, registry
from maxattn.ops.call import Call, check, check_types, describe, problem_of
from maxattn.ops.contract import Axis, Backend, Problem


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
    autocast too: the dtype of `qkv` alone decides. As anywhere in PyTorch, `backward()` belongs outside of autocast.

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
    if torch.compiler.is_compiling():
        from maxattn.ops import traced

        return traced.max_sa(qkv, axis, window, bias, scale, dropout_p, backend)
    try:
        call = describe(qkv, axis, window, bias, scale, dropout_p)
        plan = _plan(call, *dispatch.asked(backend, dispatch.eager_override()))
    except (AttributeError, TypeError):
        check_types(qkv, axis, bias, scale, dropout_p, backend)
        raise
    return dispatch.execute(plan.backend, qkv, bias, plan.problem)


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
    check_types(qkv, axis, bias, scale, dropout_p, backend)
    call = describe(qkv, axis, window, bias, scale, dropout_p)
    check(call)
    return dispatch.explain_problem(problem_of(call, dispatch.compute_capability(call.device)), backend)


@lru_cache(maxsize=4096)
def _plan(call: Call, asked_by: str, names: str | None) -> Plan:
    check(call)
    problem = problem_of(call, dispatch.compute_capability(call.device))
    return Plan(dispatch.choose(problem, asked_by, names), problem)


registry.on_change(_plan.cache_clear)
