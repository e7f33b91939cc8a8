"""Max-SA by every backend that can serve it, beside the time that moving its bytes takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from maxattn.bench.compare import Candidate, Show, Span, compare, silent
from maxattn.bench.machine import this_machine
from maxattn.bench.results import Case, Keep, Result, Row, Time, lose
from maxattn.bench.timing import Call, Effort, Sampler, captured, copy_bandwidth, on_gpu, release, wall_clock
from maxattn.ops.contract import Axis, Problem, dtype_name
from maxattn.ops.dispatch import compute_capability, list_backends
from maxattn.ops.max_sa import explain, max_sa

Pass = Literal["forward", "training", "training without a graph"]
Verify = Callable[[Callable[[Tensor, Tensor | None], Tensor], Problem], None]
"""Raises if a function of qkv and bias does not compute what the problem says, or not all of its gradients."""

HEAD_DIM = 32
MOVED = {"forward": 4, "training": 12, "training without a graph": 12}
"""How often B H W C elements must be moved at least: q, k, v and the output; in training their gradients, and q, k, v
and the output's gradient once more."""
COMPILED = "+compile"
BIAS = torch.float32
CHECKED_BYTES = 2**26
"""About the largest tensor of weights in fp64, (windows, heads, N, N), of the images that are checked."""


@dataclass(frozen=True)
class Shape:
    """One call: images, pixels, channels, and tokens of a window."""

    batch: int
    size: tuple[int, int]
    width: int
    window: tuple[int, int]

    @property
    def elements(self) -> int:
        return self.batch * self.size[0] * self.size[1] * self.width

    def case(self, axis: Axis, dtype: torch.dtype, what: Pass, *, bias: bool) -> Case:
        sizes = {"size": self.size, "window": self.window}
        size, window = (n[0] if n[0] == n[1] else f"{n[0]}x{n[1]}" for n in sizes.values())
        return {
            "batch": self.batch,
            "size": size,
            "width": self.width,
            "window": window,
            "axis": axis,
            "dtype": dtype_name(dtype),
            "bias": dtype_name(BIAS) if bias else "none",
            "pass": what,
        }


def shapes(batch: int, *, more: bool) -> tuple[Shape, ...]:
    """The four stages of MaxViT-T at 224 pixels; and `more`, with windows of 8 to 28, of fewer images.

    Example:
        >>> [(shape.size[0], shape.width) for shape in shapes(8, more=False)]
        [(56, 64), (28, 128), (14, 256), (7, 512)]
    """
    stages = [(1, 56, 64, 7), (1, 28, 128, 7), (1, 14, 256, 7), (1, 7, 512, 7)]
    others = [(2, 64, 64, 8), (4, 96, 64, 12), (4, 56, 64, 14), (4, 64, 64, 16), (8, 112, 64, 28)]
    return tuple(
        Shape(max(1, batch // fewer), (size, size), width, (window, window))
        for fewer, size, width, window in [*stages, *(others if more else ())]
    )


def measure(
    shapes: Sequence[Shape],
    verify: Verify,
    *,
    axes: Sequence[Axis] = ("block", "grid"),
    passes: Sequence[Pass] = ("forward", "training"),
    biases: Sequence[bool] = (True,),
    backends: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    effort: Effort | None = None,
    show: Show = silent,
    keep: Keep = lose,
) -> Result:
    """Each backend on each shape: time, peak memory; and beside them the floor, and a copy of as many bytes.

    On CUDA a call is the replay of a CUDA graph with a cold cache, timed by the GPU; but for the pass "training without
    a graph", which is what a caller of eager code waits for. Elsewhere the wall clock times warm calls.

    Args:
        shapes: of the calls; widths must be multiples of 32, the head dim.
        verify: called for each candidate, with at most as many images as fp64 leaves room for.
        biases: with a bias in fp32, without one, or in turn.
        backends: names, also with "+compile" for one under `torch.compile`; by default all, on CUDA the compiled
            specification too.
        show: is told how far it is.
        keep: is given the result so far after each case, and at last the finished one.

    Raises:
        ValueError: for a width that heads of 32 do not divide.

    Example:
        >>> result = measure([Shape(1, (4, 4), 32, (2, 2))], lambda attend, problem: None, axes=["block"],
        ...                  passes=["forward"], backends=["naive"], effort=Effort(least=2, most=2, sample=0))
        >>> [row.candidate for row in result.rows]
        ['floor', 'copy', 'naive']
    """
    effort = effort or Effort()
    names = backends or [*list_backends(), *([f"naive{COMPILED}"] if device == "cuda" else [])]
    calls = [(shape, axis, bias, what) for bias in biases for shape in shapes for axis in axes for what in passes]
    for shape in shapes:
        if shape.width % HEAD_DIM:
            raise ValueError(f"width {shape.width} is no multiple of {HEAD_DIM}, the channels of a head")
    span = Span(show)
    span.tell(0, "copy bandwidth")
    bandwidth = copy_bandwidth(device, effort)
    settings: dict[str, str | int | float] = {"bytes_per_second": bandwidth, "head_dim": HEAD_DIM}
    result = Result(kind="op", machine=this_machine(device), settings=settings, checked=True, finished=False)
    for number, (shape, axis, bias, what) in enumerate(calls):
        case, part = shape.case(axis, dtype, what, bias=bias), span.part(number, len(calls))
        floor = shape.elements * dtype.itemsize * MOVED[what] / bandwidth
        rows = [Row(case=case, candidate="floor", library="floor", time=Time(median=floor))]
        found = [_copy(shape, dtype, device)] if what == "forward" else []
        unable = []
        for name in names:
            problem = _problem(shape, axis, dtype, device, what, bias=bias)
            reasons = _reasons(name, problem)
            if reasons:
                unable.append(Row(case=case, candidate=name, library=name.removesuffix(COMPILED), note=reasons))
            else:
                found.append(_candidate(name, shape, problem, what, verify))
        rows += compare(case, found, device, effort, partial(_sampler, device, effort, what), part)
        result = result.plus([*rows, *unable])
        keep(result)
        release(device)
    result = replace(result, finished=True)
    keep(result)
    return result


def _sampler(device: str, effort: Effort, what: Pass, call: Call) -> Sampler:
    if device != "cuda" or what == "training without a graph":
        return wall_clock(call, device, effort)
    return on_gpu(captured(call))


def _problem(shape: Shape, axis: Axis, dtype: torch.dtype, device: str, what: Pass, *, bias: bool) -> Problem:
    training = what != "forward"
    return Problem(
        axis=axis,
        window=shape.window,
        batch=shape.batch,
        height=shape.size[0],
        width=shape.size[1],
        heads=shape.width // HEAD_DIM,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=device,
        compute_capability=compute_capability(torch.device(device)),
        bias=BIAS if bias else None,
        requires_grad=training,
        bias_requires_grad=training and bias,
    )


def _reasons(name: str, problem: Problem) -> str:
    """Why a backend cannot serve the problem; empty if it can."""
    asked = replace(problem, compiling=name.endswith(COMPILED))
    explanation = explain(asked, backend=name.removesuffix(COMPILED))
    if explanation.backend is not None:
        return ""
    answers = [one for one in explanation.candidates if one.name == name.removesuffix(COMPILED)]
    return "not able: " + "; ".join(str(reason) for one in answers for reason in one.reasons)


def _copy(shape: Shape, dtype: torch.dtype, device: str) -> Candidate:
    """A copy of as many bytes as a forward pass must move: what a launch and a problem of this size cost at least."""

    def make() -> Call:
        source = torch.ones(2 * shape.elements, dtype=dtype, device=device)
        return partial(torch.empty_like(source).copy_, source)

    return Candidate(name="copy", make=make, library="floor")


def _candidate(name: str, shape: Shape, problem: Problem, what: Pass, verify: Verify) -> Candidate:
    compiled = name.endswith(COMPILED)

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        return max_sa(qkv, problem.axis, problem.window, bias, backend=name.removesuffix(COMPILED))

    function = torch.compile(attend, dynamic=False, fullgraph=True) if compiled else attend

    def wrong(call: Call) -> str:
        windows = -(-shape.size[0] // shape.window[0]) * -(-shape.size[1] // shape.window[1])
        images = CHECKED_BYTES // (windows * problem.heads * problem.tokens**2 * 8)
        verify(function, replace(problem, batch=max(1, min(shape.batch, images))))
        return ""

    return Candidate(
        name=name,
        make=lambda: _call(function, problem, what),
        library=name.removesuffix(COMPILED),
        mode="compiled" if compiled else "eager",
        wrong=wrong,
    )


def _call(attend: Callable[[Tensor, Tensor | None], Tensor], problem: Problem, what: Pass) -> Call:
    """The call that is timed, on tensors of its own."""
    B, H, W, h, d, N = (*_sizes(problem), problem.heads, problem.head_dim, problem.tokens)
    generator = torch.Generator(problem.device).manual_seed(0)
    random = partial(torch.randn, device=problem.device, generator=generator)
    qkv = random(B, H, W, 3, h, d, dtype=problem.dtype)
    bias = None if problem.bias is None else random(h, N, N, dtype=problem.bias)
    gradient = random(B, H, W, h, d, dtype=problem.dtype)

    def infer() -> Tensor:
        with torch.no_grad():
            return attend(qkv, bias)

    def train() -> tuple[Tensor, ...]:
        of_qkv, of_bias = qkv.detach().requires_grad_(), None if bias is None else bias.detach().requires_grad_()
        leaves = [leaf for leaf in (of_qkv, of_bias) if leaf is not None]
        return torch.autograd.grad(attend(of_qkv, of_bias), leaves, gradient)

    return infer if what == "forward" else train


def _sizes(problem: Problem) -> tuple[int, int, int]:
    assert problem.batch is not None
    assert problem.height is not None
    assert problem.width is not None
    return problem.batch, problem.height, problem.width
