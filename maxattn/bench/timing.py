"""Timing candidates side by side, and the memory that a call takes.

What disturbs a machine (other programs, its clock, its heat) changes over seconds. So one sample of each candidate is
taken in turn, round by round: a disturbance hits all of them alike.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from maxattn.bench.results import Time
from maxattn.inference import onednn
from maxattn.ops.registry import told

Call = Callable[[], object]
Sampler = Callable[[], float]
OUT_OF_MEMORY = "out of memory"
CACHE_BYTES = 2**28
"""More than any GPU's cache holds."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: rounds until `seconds` a candidate are over, at least `least` and at most `most`."""

    seconds: float = 4.0
    least: int = 5
    most: int = 50
    sample: float = 0.02
    """Seconds of a sample of the wall clock at least: short calls are repeated within one."""


QUICK = Effort(seconds=0.2, least=2, most=5, sample=0.002)


def interleaved(
    samplers: Mapping[str, Sampler],
    effort: Effort,
    done: Call = lambda: None,
    dropped: Callable[[str, str], None] | None = None,
) -> dict[str, Time]:
    """Rounds of one sample of each in turn, every second round backwards; `done` is called after each sample.

    One that raises has no time, and takes no more turns: `dropped` is told its name and why, and that nothing here
    holds it any longer. Without `dropped` the error is the caller's.

    Example:
        >>> times = interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, Effort(least=3, most=3))
        >>> times["b"].median, times["b"].samples
        (2.0, 3)
    """
    left = dict(samplers)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    started, allowed = time.perf_counter(), effort.seconds * len(samplers)
    for number in range(effort.most):
        if number >= effort.least and time.perf_counter() - started > allowed:
            break
        for name in list(left) if number % 2 == 0 else reversed(list(left)):
            why = ""
            try:
                samples[name].append(left[name]())
            except Exception as error:  # of any library
                if dropped is None:
                    raise
                why = failure(error)
            if why and dropped is not None:  # by now the error is gone, which holds all that the call had made
                del left[name]
                dropped(name, why)
            done()
    return {name: Time.of(samples[name]) for name in left}


def wall_clock(call: Call, device: str, effort: Effort) -> Sampler:
    """Samples of the wall clock, of calls in a row, with all that they start on the device; the call is warm."""
    calls = max(1, math.ceil(effort.sample / max(seconds(call, device), 1e-7)))
    return partial(seconds, call, device, calls)


def on_gpu(call: Call) -> Sampler:
    """Samples of the GPU's own clock, of one call with a cold cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        _cache().zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


@dataclass(frozen=True)
class Recording:
    """A call as a CUDA graph. The graph reads where the call's tensors were, and so they are kept."""

    graph: torch.cuda.CUDAGraph
    call: Call

    def __call__(self) -> None:
        self.graph.replay()


def captured(call: Call) -> Recording:
    """The call as the replay of a CUDA graph, which takes no time of Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return Recording(graph, call)


def seconds(call: Call, device: str, calls: int = 1) -> float:
    """Wall-clock seconds a call, of `calls` in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def peak_mib(call: Call, device: str) -> float:
    """The most memory of PyTorch's allocator that a call takes at once, beyond what was there before, in MiB."""
    if device == "cpu":
        return _peak_on_cpu(call)
    gc.collect()
    synchronize(device)
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    call()
    synchronize(device)
    return (torch.accelerator.max_memory_allocated() - before) / 2**20


def graphs_mib(device: str) -> float:
    """The memory that CUDA graphs keep for their tensors, in MiB, apart from all else."""
    if device != "cuda":
        return 0.0
    pools = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)]
    return sum(segment["total_size"] for segment in pools) / 2**20


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Within the block cuDNN tries its kernels for each shape, and takes the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def free(device: str) -> None:
    """Let go of memory that nothing uses, and that is kept for later."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def release(device: str) -> None:
    """Let go of what has been compiled, too."""
    torch.compiler.reset()
    free(device)


def copy_bandwidth(device: str, effort: Effort) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    sampler = on_gpu(copy) if device == "cuda" else wall_clock(copy, device, effort)
    return 2 * source.numel() / interleaved({"copy": sampler}, effort)["copy"].median


def product_rate(device: str, dtype: torch.dtype, effort: Effort) -> float:
    """Floating point operations a second, a multiply-add being two, of a large product of random matrices.

    On the CPU by the faster of PyTorch's usual library and oneDNN, which on some processors is twice as fast.
    """
    with torch.no_grad():
        packs = onednn.serves(*torch.empty(2, 1, 1, device=device, dtype=dtype))
        side = 8192 if device == "cuda" else 2048 if packs else 512  # without fast products even this takes long
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        products: dict[str, Call] = {"usual": partial(torch.mm, a, b)}
        if packs:
            products["oneDNN"] = partial(onednn.linear, a, onednn.pack_linear(b), None, onednn.PostOp("none"))
        samplers: dict[str, Sampler] = {}
        for name, product in products.items():
            product()
            samplers[name] = on_gpu(product) if device == "cuda" else wall_clock(product, device, effort)
        times = interleaved(samplers, effort)
    return 2 * side**3 / min(time.median for time in times.values())


def failure(error: BaseException) -> str:
    """Why a candidate has no time, in a line."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    line = told(error)
    return line if len(line) <= 200 else f"{line[:200]} ..."


@cache
def _cache() -> Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")


def _peak_on_cpu(call: Call) -> float:
    """By the profiler's record of every allocation: the process's own size also shows what freed memory it keeps."""
    with _garbage_kept(), _silent_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most / 2**20


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Within the block no garbage of before is freed, which would count against what the call takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """The profiler tells on the process's standard error, past Python, when it starts and stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
