"""Hypothesis strategies for problems that a backend declares it can serve, and for cases of them.

Drawn small first: what hypothesis shrinks to is a small problem in contiguous memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch
from hypothesis import strategies as st

from maxattn.ops.call import DTYPES
from maxattn.ops.contract import Axis, Capabilities, Problem
from maxattn.testing.case import BIAS_LAYOUTS, GRADIENT_LAYOUTS, QKV_LAYOUTS, VALUES, Case

AXES: tuple[Axis, ...] = ("block", "grid")
SMALL_HEAD_DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 17, 20, 24, 32, 33, 40, 48, 50, 56, 64, 65, 72, 80, 96, 100)
HEAD_DIMS = (*SMALL_HEAD_DIMS, 112, 128, 160, 192, 224, 256)
LARGEST_SIDE = 40
SMALL_TOKENS = 64
SCALES = (None, 0.0, 1.0, 0.3, -0.5)


def windows(facts: Capabilities, most: int = SMALL_TOKENS) -> list[tuple[int, int]]:
    """Windows that `facts` allow, small and square ones first; of more than `most` tokens only where no other is.

    Example:
        >>> windows(Capabilities(), most=2)
        [(1, 1), (1, 2), (2, 1)]
    """
    low, high = facts.window_tokens or (1, LARGEST_SIDE**2)
    sides = range(1, max(LARGEST_SIDE, isqrt(low - 1) + 1) + 1)
    allowed = [(a, b) for a in sides for b in sides if low <= a * b <= min(high, max(most, 2 * low))]
    return sorted(allowed, key=lambda window: (window[0] * window[1], abs(window[0] - window[1]), window))


def head_dims(facts: Capabilities, most: int = HEAD_DIMS[-1]) -> list[int]:
    """Head dims that `facts` allow, small ones first, with both ends; above `most` only where no other is.

    Example:
        >>> head_dims(Capabilities(head_dims=(16, 36), head_dim_multiple=4))
        [16, 20, 24, 32, 36]
    """
    low, high = facts.head_dims or (1, HEAD_DIMS[-1])
    multiple = facts.head_dim_multiple
    known = {*HEAD_DIMS, -(-low // multiple) * multiple, high // multiple * multiple}
    allowed = sorted(d for d in known if low <= d <= high and d % multiple == 0)
    return [d for d in allowed if d <= most] or allowed[:1]


def dtypes(facts: Capabilities) -> list[torch.dtype]:
    """Dtypes that `facts` allow, the most exact first."""
    return [dtype for dtype in reversed(DTYPES) if dtype in facts.dtypes]


def bias_dtypes(facts: Capabilities) -> list[torch.dtype]:
    """Dtypes of a bias that `facts` allow, the most exact first; none where there may be no bias."""
    if not facts.bias:
        return []
    return [dtype for dtype in reversed(DTYPES) if facts.bias_dtypes is None or dtype in facts.bias_dtypes]


@st.composite
def problems(
    draw: st.DrawFn,
    facts: Capabilities,
    base: Problem,
    *,
    among: Sequence[tuple[int, int]] = (),
    groups: int = 3,
    ragged: bool | None = None,
    gradients: Sequence[tuple[bool, bool]] = ((False, False),),
    scales: Sequence[float | None] = (None,),
) -> Problem:
    """Small problems that `facts` allow, on the device of `base`.

    `among` are the windows to choose from, by default all small ones; `groups` is about how many fit a side at most.
    `ragged` asks for sizes that the window does not divide, or for none such; None leaves it open. `gradients` are the
    choices of whether qkv and whether the bias needs one, cut to what `facts` allow.
    """
    allowed = [window for window in among or windows(facts) if not ragged or window != (1, 1)]
    window = draw(st.sampled_from(allowed))
    sides = partial(_sides, groups=groups, ragged=facts.ragged if ragged is None else ragged, always=bool(ragged))
    bias = draw(st.sampled_from((*bias_dtypes(facts), None)))
    of_qkv, of_bias = draw(st.sampled_from(gradients))
    height, width = draw(sides(window))
    return replace(
        base,
        axis=draw(st.sampled_from(AXES)),
        window=window,
        batch=draw(_up_to(3)),
        height=height,
        width=width,
        heads=draw(st.sampled_from((1, 2, 3, 4, 8))),
        head_dim=draw(st.sampled_from(head_dims(facts, most=64)) | st.sampled_from(_any_head_dim(facts))),
        dtype=draw(st.sampled_from(dtypes(facts))),
        bias=bias,
        requires_grad=of_qkv and facts.backward,
        bias_requires_grad=of_bias and bias is not None and facts.backward and facts.bias_gradient,
        scale=draw(st.sampled_from(scales)),
    )


def cases(
    facts: Capabilities,
    base: Problem,
    *,
    layouts: bool = False,
    values: Sequence[str] = ("normal",),
    **of_problem: Any,
) -> st.SearchStrategy[Case]:
    """Cases of `problems(facts, base, **of_problem)`, in contiguous memory unless `layouts` asks for any layout.

    Example:
        >>> from hypothesis import find
        >>> base = Problem(axis="block", window=(1, 1), batch=1, height=1, width=1, heads=1, head_dim=1)
        >>> print(find(cases(Capabilities(head_dim_multiple=8), base), lambda case: case.problem.heads > 1))
        block 1x1, image 1x1x1, 2 heads of 8, float64, cpu, bias float64, no gradient; seed 0
    """

    def names(table: Iterable[str]) -> st.SearchStrategy[str]:
        return st.sampled_from(tuple(table)) if layouts else st.just("contiguous")

    return st.builds(
        Case,
        problem=problems(facts, base, **of_problem),
        layout=names(QKV_LAYOUTS),
        bias_layout=names(BIAS_LAYOUTS),
        grad_layout=names((*GRADIENT_LAYOUTS, "sum")),
        values=st.sampled_from(values),
        seed=st.sampled_from(range(2**16)),
    )


ANYTHING: dict[str, Any] = {
    "layouts": True,
    "values": VALUES,
    "scales": SCALES,
    "gradients": ((True, True), (True, False), (False, True), (False, False)),
}
"""For `cases`: all that varies, at once."""


def _up_to(most: int) -> st.SearchStrategy[int]:
    """From 1 to `most`. Not `st.integers`, which also draws from constants it finds in the code around."""
    return st.sampled_from(range(1, most + 1))


def _any_head_dim(facts: Capabilities) -> list[int]:
    """Every head dim that `facts` allow up to 128, or the smallest."""
    low, high = facts.head_dims or (1, HEAD_DIMS[-1])
    allowed = range(-(-low // facts.head_dim_multiple) * facts.head_dim_multiple, high + 1, facts.head_dim_multiple)
    return [d for d in allowed if d <= 128] or list(allowed[:1])


def _sides(window: tuple[int, int], *, groups: int, ragged: bool, always: bool) -> st.SearchStrategy[tuple[int, int]]:
    """Heights and widths of up to about `groups` windows a side."""
    if not ragged:
        return st.tuples(*(_up_to(groups).map(side.__mul__) for side in window))
    pairs = st.tuples(*(_up_to(groups * side + 2) for side in window))
    if not always:
        return pairs
    return pairs.filter(lambda size: size[0] % window[0] != 0 or size[1] % window[1] != 0)
