"""A training step of whole networks: forward, backward and fused AdamW; ours and the same of other libraries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.bench.attention import attention_backends, attention_problems
from maxattn.bench.compare import Candidate, Show, Span, compare, silent
from maxattn.bench.machine import this_machine
from maxattn.bench.model import MODES
from maxattn.bench.networks import (
    Variant,
    case_facts,
    compiled,
    images_of,
    laid_out,
    missing,
    specs_of,
    variants,
)
from maxattn.bench.results import Keep, Mode, Result, lose
from maxattn.bench.timing import Call, Effort, fastest_convolutions, release, wall_clock
from maxattn.nn.checkpointing import Checkpointing
from maxattn.spec import MaxViTSpec


def measure(
    specs: Sequence[str | Path | MaxViTSpec],
    *,
    batches: Sequence[int] = (8,),
    img_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    modes: Sequence[Mode] = MODES,
    peers: bool = True,
    effort: Effort | None = None,
    show: Show = silent,
    keep: Keep = lose,
) -> Result:
    """A step on a batch that is there already: time, and peak memory with weights, gradients and the optimizer's state.

    Ours is measured with checkpointing too: selective, and in eager code whole, where each block keeps its input alone.
    Of the `modes`, "recorded" is compiled and replayed as CUDA graphs.
    Weights are in fp32, and a `dtype` of fewer bits is that of autocast. Without dropout and stochastic depth, so that
    all compute the same: the loss of the first step, and the norm of its gradient, are checked against ours in the next
    finer dtype (fp32 for autocast, fp64 for fp32), to the square root of the rounding of `dtype`.

    Raises:
        ValueError: for the mode "recorded" on a CPU.

    Example:
        >>> result = measure(["nano"], batches=[2], modes=["eager"], effort=Effort(least=2, most=2, sample=0))
        >>> result.rows[0].candidate, result.rows[0].mib > 1
        ('maxattn, eager', True)
    """
    if "recorded" in modes and device == "cpu":
        raise ValueError("recorded: CUDA graphs are of a GPU; on a cpu there are eager and compiled")
    effort = effort or Effort()
    wanted = [(spec, batch) for spec in specs_of(specs, img_size) for batch in batches]
    settings: dict[str, str | int | float] = {} if device == "cpu" else {"cudnn_benchmark": "on"}
    result = Result(kind="train", machine=this_machine(device), settings=settings, checked=True, finished=False)
    eager: list[Mode] = [mode for mode in modes if mode == "eager"]
    for number, (spec, batch) in enumerate(wanted):
        span = Span(show).part(number, len(wanted))
        span.tell(0, f"{spec.name}: weights")
        images = images_of(spec, batch, torch.float32, device)
        found, reasons = variants(spec, peers=peers)
        exact: dict[int, tuple[float, float]] = {}
        asked = attention_problems(spec, batch, dtype, device, training=True)
        attention = {mode: attention_backends(asked, compiling=mode != "eager") for mode in modes}
        ours, *theirs = found
        networks: list[tuple[Variant, Sequence[Mode]]] = [
            (ours, modes),
            (_checkpointed(ours, "selective"), modes),
            (_checkpointed(ours, True), eager),
            *((variant, modes) for variant in theirs),
        ]
        candidates = [
            _candidate(variant, images, dtype, mode, exact, attention[mode])
            for variant, its_modes in networks
            for mode in its_modes
        ]
        candidates += missing(reasons)
        case = case_facts(spec, batch, dtype)
        sampler = partial(wall_clock, device=device, effort=effort)
        with fastest_convolutions():
            result = result.plus(compare(case, candidates, device, effort, sampler, span))
        keep(result)
        release(device)
    result = replace(result, finished=True)
    keep(result)
    return result


class Step:
    """A training step. `first` is the loss of the first one, and the norm of its gradient over all weights."""

    def __init__(self, network: nn.Module, images: Tensor, dtype: torch.dtype, mode: Mode) -> None:
        device = images.device.type
        self.network, self.images, self.device = network.train(), images, device
        self.dtype = dtype
        recorded = mode == "recorded"
        self.forward = network if mode == "eager" else compiled(network, device, training=True, recorded=recorded)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        with torch.no_grad():
            classes = copy.deepcopy(network).eval()(images[:1]).shape[1]
        self.labels = torch.arange(len(images), device=device) % classes
        self.first: tuple[float, float] | None = None

    def __call__(self) -> None:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)):
            loss = F.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        if self.first is None:
            self.first = loss.item(), self._gradient_norm()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_mib(self) -> float:
        """Memory of weights, buffers and the optimizer's state."""
        state = [x for kept in self.optimizer.state.values() for x in kept.values() if isinstance(x, Tensor)]
        tensors = [*self.network.parameters(), *self.network.buffers(), *state]
        return sum(tensor.nbytes for tensor in tensors) / 2**20

    def _gradient_norm(self) -> float:
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()


def _checkpointed(ours: Variant, how: Checkpointing) -> Variant:
    network = copy.deepcopy(ours.plain)
    network.set_grad_checkpointing(how)
    return replace(ours, name=f"{ours.name}, {'checkpointed' if how is True else how}", network=network)


def _candidate(
    variant: Variant,
    images: Tensor,
    dtype: torch.dtype,
    mode: Mode,
    exact: dict[int, tuple[float, float]],
    attention: str = "",
) -> Candidate:
    def make() -> Call:
        return Step(*laid_out(variant.network, images, variant.layout), dtype, mode)

    def wrong(call: Call) -> str:
        key = id(variant.plain)
        if key not in exact:
            exact[key] = _exact(variant, images, dtype)
        assert isinstance(call, Step)
        assert call.first is not None
        return _differs(call.first, exact[key], dtype)

    def state_mib(call: Call) -> float:
        assert isinstance(call, Step)
        return call.state_mib()

    return Candidate(
        name=f"{variant.name}, {mode}",
        library=variant.library,
        mode=mode,
        make=make,
        wrong=wrong,
        extra_mib=state_mib,
        shares_graphs=mode == "recorded",
        attention=attention if variant.library == "maxattn" else "",
    )


def _exact(variant: Variant, images: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    finer = torch.float64 if dtype == torch.float32 else torch.float32
    step = Step(copy.deepcopy(variant.plain).to(images.device, finer), images.to(finer), finer, "eager")
    step()
    assert step.first is not None
    return step.first


def _differs(seen: tuple[float, float], exact: tuple[float, float], dtype: torch.dtype) -> str:
    allowed = torch.finfo(dtype).eps ** 0.5
    names = ("the loss", "the norm of the gradient")
    return "; ".join(
        f"{name} is {one:.6g}, not {other:.6g}"
        for name, one, other in zip(names, seen, exact, strict=True)
        if not abs(one - other) <= allowed * abs(other)
    )
