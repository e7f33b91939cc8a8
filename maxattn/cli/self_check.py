"""Does a backend compute here what the specification says? Small problems, against `naive` in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from maxattn.cli.output import dtype_name
from maxattn.ops.contract import Axis, Backend
from maxattn.ops.max_sa import explain, max_sa

WINDOW, HEADS, HEAD_DIM = (7, 5), 2, 32
SIZES = {"full": (14, 10), "ragged": (16, 13)}
DTYPES = (torch.float32, torch.bfloat16)
UNITS = 8
"""How many machine epsilons are allowed beyond twice the error of `naive`: faults are sought here, not last bits."""


@dataclass(frozen=True)
class Check:
    """One problem given to one backend: `problem` in words, and how it went.

    `share` is the largest error as a share of what is allowed, of the output or any gradient; None if there is none,
    or no finite one. `detail` has the reasons of an unable backend, or what failed.
    """

    backend: str
    device: str
    problem: str
    status: Literal["ok", "failed", "unable"]
    share: float | None = None
    detail: str = ""


def check_backend(backend: Backend, device: str) -> list[Check]:
    """Have `backend` compute block and grid attention, with full and with ragged windows, in fp32 and bf16.

    Bias and gradients are asked for where it declares them. Allowed is twice naive's own error in the dtype, plus a
    few machine epsilons; errors are 2-norms. The backend must be registered.
    """
    axes: tuple[Axis, ...] = ("block", "grid")
    return [_check(backend, device, dtype, axis, size) for dtype, axis, size in product(DTYPES, axes, SIZES)]


def _check(backend: Backend, device: str, dtype: torch.dtype, axis: Axis, size: str) -> Check:
    facts = backend.capabilities
    qkv, bias, upstream = _inputs(SIZES[size], device, dtype, facts.bias)
    qkv.requires_grad_(facts.backward)
    if bias is not None:
        bias.requires_grad_(facts.backward and facts.bias_gradient)
    words = f"{axis}, {size}, {dtype_name(dtype)}"
    answer = next(
        candidate
        for candidate in explain(qkv, axis, WINDOW, bias, backend=backend.name).candidates
        if candidate.name == backend.name
    )
    if not answer.able:
        crashed = any(reason.code == "crashed" for reason in answer.reasons)
        status: Literal["failed", "unable"] = "failed" if crashed else "unable"
        return Check(backend.name, device, words, status, detail="; ".join(map(str, answer.reasons)))
    try:
        results = _run(backend.name, qkv, bias, upstream, axis)
        naive = _run("naive", qkv, bias, upstream, axis)
        exact = _run("naive", _exact(qkv), None if bias is None else _exact(bias), _exact(upstream), axis)
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(backend.name, device, words, "failed", detail=told)
    wrong, shares = zip(*_compare(results, naive, exact), strict=True)
    share = max(shares) if all(map(math.isfinite, shares)) else None
    return Check(backend.name, device, words, "failed" if any(wrong) else "ok", share, "; ".join(filter(None, wrong)))


def _inputs(
    size: tuple[int, int], device: str, dtype: torch.dtype, with_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """qkv, bias and the gradient of the output; the same values on every device."""
    generator, N = torch.Generator().manual_seed(0), WINDOW[0] * WINDOW[1]
    shapes = [(2, *size, 3, HEADS, HEAD_DIM), (HEADS, N, N), (2, *size, HEADS, HEAD_DIM)]
    qkv, bias, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return qkv, bias if with_bias else None, upstream


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double().requires_grad_(x.requires_grad)


def _run(name: str, qkv: Tensor, bias: Tensor | None, upstream: Tensor, axis: Axis) -> dict[str, Tensor]:
    """The output and the gradients that are asked for."""
    with torch.enable_grad():
        out = max_sa(qkv, axis, WINDOW, bias, backend=name)
    if out.shape != upstream.shape or out.dtype != upstream.dtype:
        seen, wanted = (f"{tuple(x.shape)} {dtype_name(x.dtype)}" for x in (out, upstream))
        raise ValueError(f"the output is {seen}, not {wanted}")
    given = {"qkv": qkv} if bias is None else {"qkv": qkv, "bias": bias}
    inputs = {f"gradient of {what}": x for what, x in given.items() if x.requires_grad}
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream) if inputs else ()
    return {"output": out, **dict(zip(inputs, gradients, strict=True))}


def _compare(
    results: dict[str, Tensor], naive: dict[str, Tensor], exact: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """For each result what is wrong with it, if anything, and its error as a share of what is allowed."""
    for what, result in results.items():
        error, unit = _error(result, exact[what]), torch.finfo(result.dtype).eps * exact[what].norm().item()
        allowed = 2 * _error(naive[what], exact[what]) + UNITS * unit
        told = "" if error <= allowed else f"{what} is off by {error:.3g} in the 2-norm, allowed: {allowed:.3g}"
        yield told, error / allowed


def _error(result: Tensor, exact: Tensor) -> float:
    return (result.detach().cpu().double() - exact).norm().item()
