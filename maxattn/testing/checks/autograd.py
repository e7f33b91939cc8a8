"""The backward pass among autograd's other features: none of them may give a wrong gradient in silence."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maxattn.testing import strategies
from maxattn.testing.budget import NAIVE, UNITS_FP64, collect
from maxattn.testing.case import Case, Inputs
from maxattn.testing.failure import require
from maxattn.testing.observe import Attend, check_output, verify, within_budget
from maxattn.testing.registry import check, declared
from maxattn.testing.subject import NO_GRADIENT, Subject


@check("a second backward pass over a graph that is kept gives the same gradients", declared("backward"))
def second_backward(subject: Subject) -> None:
    subject.try_each(subject.variants({}), lambda case: _check_second_backward(subject, case))


def _check_second_backward(subject: Subject, case: Case) -> None:
    inputs = case.tensors()
    leaves = inputs.leaves
    out = subject.attend(case)(inputs.qkv, inputs.bias)
    for retain in (True, False):
        within_budget(collect(out, leaves, inputs.grad_out, retain=retain), inputs, case)


@check("what is changed in place before the backward pass raises an error, or does not matter", declared("backward"))
def changed_before_backward(subject: Subject) -> None:
    subject.try_each(subject.variants({}), lambda case: _check_changed_before_backward(subject, case))


def _check_changed_before_backward(subject: Subject, case: Case) -> None:
    inputs = case.tensors()
    leaves = inputs.leaves
    for name in (*leaves, "out"):
        copies = {of: leaf.clone() for of, leaf in leaves.items()}
        out = subject.attend(case)(copies["qkv"], copies.get("bias", inputs.bias))
        kept = out.detach().clone()
        with torch.no_grad():
            (copies | {"out": out})[name].mul_(2)
        try:
            results = collect(out, leaves, inputs.grad_out)
        except RuntimeError as error:
            if "inplace" not in str(error) and "in-place" not in str(error):
                raise
            continue
        within_budget(results | {"out": kept}, inputs, case)


@check("a derivative of the gradient is right, or refused with an error: never wrong in silence", declared("backward"))
def double_backward(subject: Subject) -> None:
    finest = strategies.dtypes(subject.facts)[0]
    subject.try_each(subject.variants({"dtype": finest}), lambda case: _check_double_backward(subject, case))


def _check_double_backward(subject: Subject, case: Case) -> None:
    inputs, direction = case.tensors(), case.but(seed=case.seed + 1).tensors()
    try:
        seen = _second_derivatives(subject.attend(case), inputs, direction)
    except (RuntimeError, NotImplementedError) as error:
        require(not subject.facts.double_backward, f"double_backward is declared, but: {error}")
        return
    naive = _second_derivatives(partial(NAIVE.attend, problem=case.problem), inputs, direction)
    in_fp64 = partial(NAIVE.attend, problem=case.but(dtype=torch.float64).problem)
    exact = _second_derivatives(in_fp64, inputs.copied(torch.float64), direction)
    for name, right in exact.items():
        off, own = ((each[name].double() - right).norm().item() for each in (seen, naive))
        allowed = 2 * own + UNITS_FP64 * torch.finfo(seen[name].dtype).eps * right.norm().item()
        require(off <= allowed, f"the second derivative by {name} is off by {off:.3g}, allowed {allowed:.3g}")


def _second_derivatives(attend: Attend, inputs: Inputs, direction: Inputs) -> dict[str, Tensor]:
    """The gradient of the gradients' dot product with `direction`, by each input and by the gradient of the output."""
    leaves = inputs.leaves
    upstream = inputs.grad_out.detach().requires_grad_()
    gradients = torch.autograd.grad(attend(inputs.qkv, inputs.bias), list(leaves.values()), upstream, create_graph=True)
    directions = [x.detach().to(g.dtype) for x, g in zip(direction, gradients, strict=False) if x is not None]
    along = torch.stack([(g * x).sum().double() for g, x in zip(gradients, directions, strict=True)]).sum()
    named = {**leaves, "the gradient of the output": upstream}
    for x in named.values():
        x.grad = None
    along.backward()  # unlike autograd.grad, it runs into an error that waits where no input needs it
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in named.items()}


@check(
    "under activation checkpointing, which runs the forward pass again, the results are the same", declared("backward")
)
def checkpointing(subject: Subject) -> None:
    def check(case: Case) -> None:
        attend = subject.attend(case)
        verify(partial(checkpoint, attend, use_reentrant=False), case)

    subject.try_each(subject.variants({}), check)


@check("autocast around the call changes nothing: the dtype of qkv decides")
def autocast(subject: Subject) -> None:
    for dtype in (torch.bfloat16, torch.float16):

        def check(case: Case, dtype: torch.dtype = dtype) -> None:
            attend = subject.attend(case)

            def under_autocast(qkv: Tensor, bias: Tensor | None) -> Tensor:
                with torch.autocast(subject.device, dtype):
                    return attend(qkv, bias)

            verify(under_autocast, case)

        subject.try_each(subject.variants(*({"dtype": own} for own in strategies.dtypes(subject.facts))), check)


@check("no gradient is prepared under no_grad and inference_mode, and a later call may ask for one")
def without_gradient(subject: Subject) -> None:
    def check(case: Case) -> None:
        inputs, attend = case.tensors(), subject.attend(case)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                out = attend(inputs.qkv, inputs.bias)
            check_output(out, inputs, differentiated=False)
            plain = case.but(requires_grad=False, bias_requires_grad=False)
            within_budget(
                {"out": out.clone()}, Inputs(inputs.qkv.detach(), _detached(inputs.bias), inputs.grad_out), plain
            )

    not_seen_before = {"height": 7 * subject.base.window[0], "width": 7 * subject.base.window[1]}
    cases = subject.variants(not_seen_before)
    subject.try_each([case for case in cases if not subject.reasons(case.but(**NO_GRADIENT).problem)], check)
    subject.try_each(cases, subject.verify)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
