"""Sizes at the ends: none, very many, very far apart in memory."""

from __future__ import annotations

import torch

from maxattn.testing import strategies
from maxattn.testing.budget import collect
from maxattn.testing.case import Case, Inputs
from maxattn.testing.failure import NotApplicable, require
from maxattn.testing.observe import check_output, observe, within_budget
from maxattn.testing.registry import check, on
from maxattn.testing.subject import NO_GRADIENT, Subject

CUDA_GRID = 65_535
"""More blocks than this along the second or third axis of a CUDA grid are an error, or worse, ignored."""
DIFFERENT = 7
"""Images that are repeated to make many; a prime, so that no power of two later comes an image that is the same."""
INT32 = 2**31


@check("an empty batch gives an empty output, and gradients of zero")
def empty_batch(subject: Subject) -> None:
    subject.try_each(
        subject.variants({"batch": 0}, {"batch": 0, **NO_GRADIENT}), lambda case: _check_empty(subject, case)
    )


def _check_empty(subject: Subject, case: Case) -> None:
    inputs = case.tensors()
    for name, x in observe(subject.attend(case), inputs, case).items():
        require(not x.any().item(), f"{name} of an empty batch is not zero")


@check("more than 65,535 windows: many images, and many windows in one image")
def many_windows(subject: Subject) -> None:
    P_h, P_w = subject.largest_window(4)
    sizes = {"window": (P_h, P_w), "heads": 1, "head_dim": subject.head_dims(8)[0]}
    many_images = {"batch": CUDA_GRID + 3, "height": P_h, "width": P_w}
    one_image = {"batch": 1, "height": 271 * P_h, "width": 243 * P_w}
    if P_h * P_w <= 4:
        cases = subject.variants(many_images, one_image, **sizes)
        subject.try_each(cases, lambda case: _verify_in_place(subject, case, case.tensors()))
    else:
        cases = subject.variants(many_images | {"batch": DIFFERENT, "bias_requires_grad": False}, **sizes)
        subject.try_each(cases, lambda case: _check_repeated(subject, case))


def _check_repeated(subject: Subject, case: Case) -> None:
    """A few images again and again: the first ones, and those that come out least like them, must be right."""
    few, times = case.tensors(), CUDA_GRID // DIFFERENT + 1
    qkv, grad_out = (x.detach().repeat(times, *(1,) * (x.ndim - 1)) for x in (few.qkv, few.grad_out))
    many = Inputs(qkv.requires_grad_(few.qkv.requires_grad), few.bias, grad_out)
    out = subject.attend(case)(many.qkv, many.bias)
    results = {name: x.unflatten(0, (times, DIFFERENT)) for name, x in collect(out, many.leaves, many.grad_out).items()}
    odd = {int((x - x[0]).abs().flatten(1).amax(1).argmax()) for x in results.values()}  # NaN counts as the largest
    for turn in {0} | odd:
        within_budget({name: x[turn] for name, x in results.items()}, few, case)


def _verify_in_place(subject: Subject, case: Case, inputs: Inputs) -> None:
    """As `verify`, but for the copies of all memory."""
    out = subject.attend(case)(inputs.qkv, inputs.bias)
    check_output(out, inputs, differentiated=case.problem.differentiated)
    within_budget(collect(out, inputs.leaves, inputs.grad_out), inputs, case)


@check("elements more than 2^31 apart in memory, which 32-bit offsets do not reach")
def far_apart(subject: Subject) -> None:
    dtype = strategies.dtypes(subject.facts)[-1]
    subject.try_each(subject.variants({"dtype": dtype}), lambda case: _check_far_apart(subject, case))


def _check_far_apart(subject: Subject, case: Case) -> None:
    near = case.tensors()
    try:
        memory = torch.empty(INT32 + near.qkv[0].numel(), dtype=near.qkv.dtype, device=near.qkv.device)
    except (RuntimeError, torch.OutOfMemoryError):
        size = INT32 * near.qkv.element_size() >> 30
        raise NotApplicable(f"it takes {size} GiB of address space, which cannot be had here") from None
    far = memory.as_strided(near.qkv.shape, (INT32, *near.qkv.stride()[1:])).copy_(near.qkv.detach())
    _verify_in_place(subject, case, near._replace(qkv=far.requires_grad_(near.qkv.requires_grad)))


@check("a tensor of more than 2^31 elements", on("cuda"))
def large_tensor(subject: Subject) -> None:
    dtype = strategies.dtypes(subject.facts)[-1]
    P_h, P_w = subject.base.window
    sizes = {"batch": 1, "height": 32 * P_h, "width": 32 * P_w, "bias_requires_grad": False, "heads": 4}
    subject.try_each(subject.variants({"dtype": dtype}, **sizes), lambda case: _check_large(subject, case))


def _check_large(subject: Subject, case: Case) -> None:
    """The same image many times over: the first and the last must come out as one alone does."""
    one = case.tensors()
    images = INT32 // one.qkv.numel() + 2
    needed = 12 * INT32 * one.qkv.element_size()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        raise NotApplicable(f"it takes {needed >> 30} GiB of memory, {free >> 30} GiB are free")
    qkv = one.qkv.detach().repeat(images, 1, 1, 1, 1, 1).requires_grad_(one.qkv.requires_grad)
    grad_out = one.grad_out.repeat(images, 1, 1, 1, 1)
    many = Inputs(qkv, one.bias, grad_out)
    out = subject.attend(case)(qkv, one.bias)
    check_output(out, many, differentiated=case.problem.differentiated)
    results = collect(out, many.leaves, grad_out)
    for image in (slice(0, 1), slice(images - 1, images)):
        within_budget({name: x[image] for name, x in results.items()}, one, case)
