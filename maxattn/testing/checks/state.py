"""No call leaves a trace in another: not in caches, buffers, threads, nor by chance."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maxattn.testing import strategies
from maxattn.testing.budget import NAIVE, collect
from maxattn.testing.case import Case, Inputs
from maxattn.testing.failure import require
from maxattn.testing.observe import Attend, deterministic, observe, verify, within_budget
from maxattn.testing.registry import check, declared
from maxattn.testing.subject import NO_GRADIENT, SEVERAL_TILES, Failing, Subject, full_windows

RUNS = 12
THREADS = 4


def _alike(subject: Subject) -> list[Case]:
    """Cases that differ in one thing each, and otherwise look the same to a cache."""
    P_h, P_w = subject.base.window
    changes: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"seed": subject.seed + 1}]
    sizes = {"height": 2 * P_h * P_w, "width": P_h * P_w}
    changes += [sizes, {"height": P_h * P_w, "width": 2 * P_h * P_w}, {"window": (P_w, P_h), **sizes}]
    changes += [{"bias": None, "bias_requires_grad": False}] if subject.base.bias is not None else []
    changes += [{"dtype": dtype} for dtype in strategies.dtypes(subject.facts)]
    changes += [{"height": 2 * P_h - 1}, {"heads": 1}, {"batch": 1}, {"layout": "heads before parts"}]
    changes += [NO_GRADIENT, NO_GRADIENT | {"seed": subject.seed + 1}, NO_GRADIENT | {"seed": subject.seed + 2}]
    return subject.variants(*changes)


@check("no call depends on the calls before it: the same again after others that are alike, in any order")
def independent_calls(subject: Subject) -> None:
    cases = _alike(subject)
    subject.try_each([*cases, *reversed(cases)], subject.verify)


@check("outputs and gradients are memory of their own, kept whole by later calls and by interleaved backward passes")
def own_memory(subject: Subject) -> None:
    cases = _alike(subject)
    differentiated = [case for case in cases if case.problem.differentiated]
    plain = [case for case in cases if not case.problem.differentiated]
    for first, second in (*pairwise(differentiated), *pairwise(plain)):
        subject.try_each([first], partial(_check_interleaved, subject, second))
        subject.try_each([first], partial(_check_interleaved, subject, first.but(seed=first.seed + 7)))


def _check_interleaved(subject: Subject, *cases: Case) -> None:
    calls = [_Call.of(subject, case) for case in cases]
    results = [call.backward() for call in calls]
    for call, result in zip(calls, results, strict=True):
        within_budget(result, call.inputs, call.case)


@check("inputs changed in place between two calls, at the same address, are read anew")
def changed_inputs(subject: Subject) -> None:
    subject.try_each(subject.variants({}, NO_GRADIENT), lambda case: _check_changed(subject, case))


def _check_changed(subject: Subject, case: Case) -> None:
    inputs, others = case.tensors(), case.but(seed=case.seed + 1).tensors()
    within_budget(observe(subject.attend(case), inputs, case), inputs, case)
    for name in Inputs._fields:
        inputs.overwrite(inputs._replace(**{name: getattr(others, name)}))
        within_budget(observe(subject.attend(case), inputs, case), inputs, case)


@check("nothing of the process is changed: random numbers drawn without dropout, modes, defaults")
def no_side_effects(subject: Subject) -> None:
    cases = subject.variants(*({"dtype": dtype} for dtype in strategies.dtypes(subject.facts)))
    subject.try_each(cases, lambda case: _check_side_effects(subject, case))


def _check_side_effects(subject: Subject, case: Case) -> None:
    inputs = case.tensors()
    torch.rand(1, device=subject.device)  # so that a seed set again shows, and a number of threads set before
    random.random()
    np.random.random()  # noqa: NPY002 - what others use
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        before = _process_state(subject.device)
        observe(subject.attend(case), inputs, case)
        changed = [name for name, value in _process_state(subject.device).items() if value != before[name]]
    finally:
        torch.set_num_threads(threads)
    require(not changed, f"a call changes the {', '.join(changed)} of the process")


def _process_state(device: str) -> dict[str, Any]:
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else ())]
    return {
        "state of the random number generator": [generator.tolist() for generator in generators],
        "random numbers of Python": random.getstate(),
        "random numbers of NumPy": str(np.random.get_state(legacy=False)),  # noqa: NPY002 - what others use
        "kernels that PyTorch may choose": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.cudnn.benchmark,
        ),
        "detection of anomalies": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else None,
        "number of threads": torch.get_num_threads(),
    }


@check("the default dtype of the process does not matter: that of qkv counts")
def default_dtype(subject: Subject) -> None:
    cases = subject.variants({}, NO_GRADIENT, {"scale": 0.3})
    subject.try_each(cases, lambda case: verify(_in_bf16_mode(subject.attend(case)), case))


def _in_bf16_mode(attend: Attend) -> Attend:
    def attend_in_bf16_mode(qkv: Tensor, bias: Tensor | None) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return attend(qkv, bias)
        finally:
            torch.set_default_dtype(before)

    return attend_in_bf16_mode


@check("windows, heads and images are apart: a NaN in one shows in its output, and leaves all others as they are")
def isolated(subject: Subject) -> None:
    cut = [{"height": 2 * subject.base.window[0] + 1}] if subject.facts.ragged else []
    subject.try_each(subject.variants({}, *cut, **NO_GRADIENT), lambda case: _check_isolated(subject, case))


def _check_isolated(subject: Subject, case: Case) -> None:
    inputs = case.tensors()
    with torch.no_grad():
        inputs.qkv[0, -1, -1, :, 0] = float("nan")
        seen = subject.attend(case)(inputs.qkv, inputs.bias)
        spoilt = NAIVE.attend(inputs.qkv, inputs.bias, case.problem).isnan()
        inputs.qkv[0, -1, -1, :, 0] = 0.0
    require(not (seen.isnan() & ~spoilt).any().item(), "a NaN spreads to another window, head or image")
    require(not (spoilt & ~seen.isnan()).any().item(), "a NaN in the input is hidden from the output")
    kept = subject.attend(case)(inputs.qkv, inputs.bias).masked_fill(spoilt, 0.0)
    off = (seen.masked_fill(spoilt, 0.0) - kept).double().abs().max().item()
    require(off <= torch.finfo(seen.dtype).eps * 8, f"a NaN changes another window, head or image by {off:.3g}")


@check("calls from several threads at once do not disturb each other")
def threads(subject: Subject) -> None:
    cases = [*_alike(subject), *subject.variants(NO_GRADIENT) * RUNS]
    failures: list[Failing] = []

    def work(thread: int) -> None:
        try:
            turned = cases if thread < THREADS else cases[thread:] + cases[:thread]
            for number, same in enumerate(turned):
                case = same.but(seed=same.seed + 2 * THREADS * number + thread)
                inputs = case.tensors()
                call = _Call.of(subject, case, inputs)
                result = call.backward()
                done.append((case, inputs, result))
        except BaseException as error:
            failures.append(Failing(case, error))

    done: list[tuple[Case, Inputs, dict[str, Tensor]]] = []
    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(2 * THREADS)]
    with _eager_to_switch():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]
    require(len(done) == len(workers) * len(cases), "some calls did not return")
    for case, inputs, result in done:
        subject.try_each([case], partial(within_budget, result, inputs))


@check("the same call gives the same numbers, to rounding, however often it is made")
def repeatable(subject: Subject) -> None:
    for case in subject.variants({"height": 3 * subject.base.window[0]}):
        subject.try_each([case] * RUNS, subject.verify)


@check("bit for bit the same, forward and backward, under deterministic algorithms", declared("deterministic"))
def bitwise(subject: Subject) -> None:
    P_h, P_w = subject.base.window
    sizes = {"batch": 4, "height": 9 * P_h, "width": 9 * P_w}
    tried: list[dict[str, Any]] = [{"dtype": dtype, **sizes} for dtype in strategies.dtypes(subject.facts)]
    tried.append({"bias": None, "bias_requires_grad": False, **sizes})
    tried.append(full_windows(subject.largest_window(SEVERAL_TILES)))
    tried.append({"height": 2 * P_h - 1, "width": 3 * P_w - 1, "scale": 0.3})
    cases = subject.variants(*tried, deterministic=True)
    subject.try_each(cases, lambda case: _check_bitwise(subject, case))


def _check_bitwise(subject: Subject, case: Case) -> None:
    verify(subject.attend(case), case)
    runs = [_Call.of(subject, case).backward() for _ in range(RUNS)]
    for result in runs[1:]:
        for name, x in result.items():
            require(torch.equal(x, runs[0][name]), f"{name} differs between two runs of the same call")


@dataclass
class _Call:
    """A forward pass that has been made, and whose backward pass is still to come."""

    case: Case
    inputs: Inputs
    out: Tensor

    @classmethod
    def of(cls, subject: Subject, case: Case, inputs: Inputs | None = None) -> _Call:
        inputs = inputs or case.tensors()
        with deterministic(case.problem.deterministic), torch.set_grad_enabled(case.problem.differentiated):
            return cls(case, inputs, subject.attend(case)(inputs.qkv, inputs.bias))

    def backward(self) -> dict[str, Tensor]:
        with deterministic(self.case.problem.deterministic):
            return collect(self.out, self.inputs.leaves, self.inputs.grad_out)


@contextmanager
def _eager_to_switch() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
