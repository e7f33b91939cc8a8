"""Measure launches on this machine's own GPU, for chips other than the one that the table in `configs` comes from."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter

import torch
from triton.testing import do_bench_cudagraph

from maxattn.ops.contract import Problem
from maxattn.testing.budget import shares, told_over
from maxattn.testing.case import Case
from maxattn.testing.observe import attend_by, observe
from maxattn_triton import configs, tuned
from maxattn_triton.configs import Key, Launch


@dataclass(frozen=True)
class Measured:
    """How a launch did.

    `milliseconds` is the median of a whole call, forward and backward if the problem asks for a gradient; None if the
    launch failed, and `failure` says how. `first_call` is the time of the first one in seconds: it compiles.
    """

    key: Key
    launch: Launch
    milliseconds: float | None
    first_call: float = 0.0
    failure: str = ""


def tune(
    problem: Problem,
    launches: Callable[[Key], list[Launch]] | None = None,
    progress: Callable[[Measured], None] = lambda measured: None,
) -> list[Measured]:
    """Measure the launches of each kernel that serves `problem`, and keep the fastest on disk.

    One kernel after another, each with the best launch of those before. A launch must first give two images of the
    problem, and a smaller ragged problem, within the error budget of the conformance kit.

    Args:
        problem: of known sizes, and one that `triton` serves.
        launches: which to try for a kernel; by default `candidates`.
        progress: told of each one that is done.

    Raises:
        RuntimeError: if no launch of a kernel works.
    """
    found: list[Measured] = []
    for key in configs.keys(problem):
        tried = []
        for launch in (launches or candidates)(key):
            with configs.forced(key.kernel, launch):
                tried.append(_measure(key, launch, problem))
            progress(tried[-1])
        timed = {one.milliseconds: one.launch for one in tried if one.milliseconds is not None}
        if not timed:
            raise RuntimeError(f"no launch of {key.kernel} works: {tried[0].failure if tried else 'none is tried'}")
        tuned.save({key: timed[min(timed)]})
        found += tried
    return found


def candidates(key: Key) -> list[Launch]:
    """What is worth a try, beginning with what is used unless something else proves faster."""
    known, largest = configs.launch(key), configs.block_of(key.tokens)
    blocks = [block for block in (16, 32, 64, 128) if block <= max(largest, 16)]
    pairs = [(largest, largest)] if key.kernel == "whole.backward" else list(product(blocks, blocks))
    fits = [pair for pair in pairs if pair[0] * pair[1] * max(key.head_dim, 32) <= 64 * 128 * 64 or len(pairs) == 1]
    side_by_side = (1, 2) if key.kernel in configs.SHARING else (1,)
    found = [
        Launch(block_m, block_n, warps, stages, programs, sharing)
        for (block_m, block_n), warps, stages, programs, sharing in product(
            fits, (2, 4, 8), (2, 3), (2, 4), side_by_side
        )
    ]
    return list(dict.fromkeys([known, *found]))


def _measure(key: Key, launch: Launch, problem: Problem) -> Measured:
    P_h, P_w = problem.window
    ragged = replace(problem, batch=2, height=2 * P_h + 1, width=2 * P_w)
    same = replace(problem, batch=min(problem.batch or 2, 2))  # how work is shared depends on the size of an image
    try:
        start = perf_counter()
        over = _over_budget(ragged) or _over_budget(same)
        first_call = perf_counter() - start
        if over:
            return Measured(key, launch, None, first_call, f"over the error budget: {over}")
        milliseconds = _median(problem)
    except Exception as error:  # too much shared memory, too many registers: whatever a compiler may say
        return Measured(key, launch, None, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Measured(key, launch, milliseconds, first_call)


def _over_budget(problem: Problem) -> str:
    """What is wrong with the results for `problem`; nothing if all is well."""
    case = Case(problem=problem)
    inputs = case.tensors()
    return told_over(shares(observe(attend_by("triton", case), inputs, case), inputs, case.problem))


def _median(problem: Problem) -> float:
    """Milliseconds of a call: on a GPU from a CUDA graph, so that Python's time is not in it."""
    case = Case(problem=problem)
    inputs, attend = case.tensors(), attend_by("triton", case)
    leaves = list(inputs.leaves.values())

    def call() -> None:
        with torch.set_grad_enabled(bool(leaves)):
            out = attend(inputs.qkv, inputs.bias)
        if leaves:
            torch.autograd.grad(out, leaves, inputs.grad_out)

    if problem.device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            milliseconds: float = do_bench_cudagraph(call, return_mode="median")
            return milliseconds
    return statistics.median(timeit.repeat(call, number=1, repeat=3)) * 1e3
