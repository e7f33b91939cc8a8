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


Steps = list[list[dict[str, int]]]
"""Fields of launches to try, in steps that follow each other."""


def tune(
    problem: Problem,
    steps: Callable[[Key], Steps] | None = None,
    progress: Callable[[Measured], None] = lambda measured: None,
) -> list[Measured]:
    """Measure launches of each kernel that serves `problem`, and keep the fastest on disk.

    One kernel after another, each with the best launch of those before. It begins with the launch that is used so far;
    each step changes some fields of the fastest one until then. A launch must first give two images of the problem, and
    a smaller ragged problem, within the error budget of the conformance kit.

    Args:
        problem: of known sizes, and one that `triton` serves.
        steps: what to try for a kernel; by default `usual_steps`.
        progress: told of each launch that is done.

    Raises:
        RuntimeError: if no launch of a kernel works.
    """
    found: list[Measured] = []
    for key in configs.keys(problem):
        tried: dict[Launch, Measured] = {}
        best, unchanged = configs.launch(key), Steps([[{}]])
        for step in unchanged + (steps or usual_steps)(key):
            for launch in (best._replace(**changed) for changed in step):
                if launch not in tried:
                    with configs.forced(key.kernel, launch):
                        tried[launch] = _measure(key, launch, problem)
                    progress(tried[launch])
            times = {launch: one.milliseconds for launch, one in tried.items() if one.milliseconds is not None}
            best = min(times, key=lambda launch: times[launch]) if times else best
        if not times:
            raise RuntimeError(f"no launch of {key.kernel} works: {next(iter(tried.values())).failure}")
        tuned.save({key: best})
        found += tried.values()
    return found


def usual_steps(key: Key) -> Steps:
    """Tiles and warps, which together must fit the registers; then the pipeline, and who walks which windows."""
    largest = configs.block_of(key.tokens)
    blocks = [block for block in (16, 32, 64, 128) if block <= max(largest, 16)]
    pairs = [(largest, largest)] if key.kernel == "whole.backward" else list(product(blocks, blocks))
    fits = [pair for pair in pairs if pair[0] * pair[1] * max(key.head_dim, 32) <= 64 * 128 * 64 or len(pairs) == 1]
    side_by_side = (1, 2) if key.kernel in configs.SHARING else (1,)
    return [
        [{"block_m": m, "block_n": n, "warps": warps} for (m, n), warps in product(fits, (2, 4, 8))],
        [
            {"stages": stages, "programs": programs, "sharing": sharing}
            for stages, programs, sharing in product((2, 3), (2, 4), side_by_side)
        ],
    ]


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
