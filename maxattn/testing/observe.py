"""Running a backend on a case while watching that it keeps to the contract: what it reads, writes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from maxattn.ops.max_sa import max_sa
from maxattn.ops.naive import Naive
from maxattn.testing.budget import NAIVE, collect, shares, told_over
from maxattn.testing.case import Case, Inputs, memory_of
from maxattn.testing.failure import require

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)

Attend = Callable[[Tensor, Tensor | None], Tensor]


def attend_by(name: str, case: Case) -> Attend:
    """`max_sa` by the backend `name`, with all of the case but its tensors filled in."""
    problem = case.problem

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        return max_sa(qkv, problem.axis, problem.window, bias, problem.scale, problem.dropout_p, backend=name)

    return attend


def verify(attend: Attend, case: Case) -> None:
    """Raise CheckFailed unless the output and gradients of `attend` keep to the contract and to the error budget."""
    inputs = case.tensors()
    within_budget(observe(attend, inputs, case), inputs, case)


def within_budget(results: dict[str, Tensor], inputs: Inputs, case: Case, naive: Naive = NAIVE) -> None:
    """Raise CheckFailed where a result is further from exact than the budget allows; `naive` is the specification."""
    over = told_over(shares(results, inputs, case.problem, naive))
    require(not over, f"over the error budget: {over}")


def observe(attend: Attend, inputs: Inputs, case: Case) -> dict[str, Tensor]:
    """The output and the gradients, by name; whatever else the contract says about them and the inputs is checked."""
    qkv, bias, grad_out = inputs
    leaves = inputs.leaves
    before = [None if x is None else memory_of(x).clone() for x in inputs]
    with deterministic(case.problem.deterministic), uninitialised_is_nan():
        with torch.set_grad_enabled(bool(leaves)):
            out = attend(qkv, bias)
        for name, x in (("qkv", qkv), ("bias", bias)):
            asked = name in leaves
            require(x is None or x.requires_grad == asked, f"requires_grad of {name} was {asked}, and is changed")
        check_output(out, inputs, differentiated=bool(leaves))
        kept = out.detach().clone()
        results = collect(out, leaves, grad_out)
    require(_same(out.detach(), kept), "the backward pass changes the output")
    for name, x, old in zip(("qkv", "bias", "the gradient of the output"), inputs, before, strict=True):
        require(x is None or old is None or _same(memory_of(x), old), f"{name} is modified")
    return results


def check_output(out: Any, inputs: Inputs, *, differentiated: bool) -> None:
    """Raise CheckFailed unless `out` is what the contract says `attend` returns, apart from its numbers."""
    qkv, bias, _ = inputs
    require(isinstance(out, Tensor), f"attend returns a {type(out).__name__}, not a tensor")
    expected = (*qkv.shape[:3], *qkv.shape[4:])
    require(out.shape == expected, f"the output is {tuple(out.shape)}, not {tuple(expected)}")
    require(out.dtype == qkv.dtype, f"the output is {out.dtype}, not {qkv.dtype}")
    require(out.device == qkv.device, f"the output is on {out.device}, not {qkv.device}")
    require(out.is_contiguous(), f"the output is not contiguous: strides {out.stride()} for {tuple(out.shape)}")
    for name, x in (("qkv", qkv), ("bias", bias)):
        shared = x is not None and x.numel() and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        require(not shared, f"the output shares the memory of {name}")
    told = "an input requires a gradient" if differentiated else "no gradient is asked for"
    require(out.requires_grad == differentiated, f"{told}, but the output has requires_grad={out.requires_grad}")


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Within a `with` block, what `torch.empty` and its kin give is NaN or the largest integer: never right by luck."""
    with torch.device("meta"):
        torch.empty(0)  # has PyTorch note, once and for good, which functions obey such a block: the true ones
    with ExitStack() as stack:
        for owner, name in ALLOCATORS:
            stack.enter_context(patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """`torch.use_deterministic_algorithms` within a `with` block, if it is wanted."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with patch.dict("os.environ", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if type(x) is not Tensor:  # a compiler is tracing, and would trace the filling too
            return x
        if x.dtype.is_floating_point:
            return x.detach().fill_(float("nan")).requires_grad_(x.requires_grad)
        return x if x.dtype in (torch.bool, torch.uint8) else x.fill_(torch.iinfo(x.dtype).max)

    return allocate_poisoned


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal everywhere, NaN to NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
