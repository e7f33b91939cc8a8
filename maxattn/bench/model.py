"""Inference of whole networks: ours plain and optimised, and the same of other libraries; eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from maxattn.bench.attention import Asked, attention_backends, attention_problems
from maxattn.bench.compare import Candidate, NotMeasured, Show, Span, compare, silent
from maxattn.bench.kinds import seconds_by_kind
from maxattn.bench.machine import this_machine
from maxattn.bench.networks import (
    LAYOUTS,
    Reference,
    Variant,
    case_facts,
    compiled,
    images_of,
    laid_out,
    missing,
    specs_of,
    variants,
    work_of,
)
from maxattn.bench.peers import timm_network
from maxattn.bench.results import Keep, Mode, Result, Row, lose
from maxattn.bench.timing import (
    Call,
    Effort,
    copy_bandwidth,
    failure,
    fastest_convolutions,
    product_rate,
    release,
    wall_clock,
)
from maxattn.inference import gpu, optimize_for_inference
from maxattn.spec import MaxViTSpec, pair

UNCHECKED = "another architecture: its logits are compared with nothing"
MODES: tuple[Mode, ...] = ("eager", "compiled")


def measure(
    specs: Sequence[str | Path | MaxViTSpec],
    *,
    batches: Sequence[int] = (1, 8),
    img_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    modes: Sequence[Mode] = MODES,
    peers: bool = True,
    beside: Sequence[str] = (),
    effort: Effort | None = None,
    show: Show = silent,
    keep: Keep = lose,
) -> Result:
    """Every way to compute the logits of a batch: time and peak memory beyond weights and images.

    All have the same weights, and their logits are checked against ours in fp64 before. Compiled networks are compiled
    for the one batch: on the CPU with frozen weights, on a GPU as a CUDA graph.

    Args:
        specs: presets, spec files or specs.
        peers: whether timm's and torchvision's same architecture is measured too, in both memory layouts.
        beside: names of other networks of timm, whose logits are compared with nothing.
        show: is told how far it is.
        keep: is given the result so far after each case, and at last the finished one.

    Raises:
        ValueError: for the mode "recorded", which is of training.

    Example:
        >>> result = measure(["nano"], batches=[1], modes=["eager"], effort=Effort(least=2, most=2, sample=0))
        >>> [(row.candidate, row.note) for row in result.rows][1:3]
        [('maxattn optimized, eager', ''), ('timm', 'has no nano')]
    """
    if "recorded" in modes:
        raise ValueError(
            "recorded: there are eager and compiled; on a GPU a network compiled for inference is a CUDA graph"
        )
    effort = effort or Effort()
    wanted = [(spec, batch) for spec in specs_of(specs, img_size) for batch in batches]
    result = Result(kind="model", machine=this_machine(device), settings=_settings(device, dtype, effort), checked=True)
    result = replace(result, finished=False)
    for number, (spec, batch) in enumerate(wanted):
        span = Span(show).part(number, len(wanted))
        span.tell(0, f"{spec.name}: weights")
        images = images_of(spec, batch, dtype, device)
        found, reasons = variants(spec, peers=peers)
        references: dict[int, Reference] = {}
        asked = attention_problems(spec, batch, dtype, device)
        candidates = [one for variant in found for one in _candidates(variant, images, modes, asked, references)]
        candidates += missing(reasons)
        candidates += [one for name in beside for one in _other(name, spec, images, modes)]
        case = case_facts(spec, batch, dtype)
        sampler = partial(wall_clock, device=device, effort=effort)
        with fastest_convolutions():
            rows = compare(case, candidates, device, effort, sampler, span)
        seconds, why = ({}, "") if device == "cpu" else by_kind(found[0], images, effort)
        rows += [Row(case=case, candidate="kinds of layers", note=why)] if why else []
        result = result.plus(rows, work_of(spec, batch, dtype, seconds))
        keep(result)
        release(device)
    result = replace(result, finished=True)
    keep(result)
    return result


def by_kind(ours: Variant, images: Tensor, effort: Effort) -> tuple[dict[str, float], str]:
    """The seconds of each kind of layer of the network made for inference; or none, and why."""
    try:
        network = optimize_for_inference(copy.deepcopy(ours.plain).eval().to(images))
        return seconds_by_kind(network, images, effort.least), ""
    except Exception as error:  # it must not take along what was measured before
        return {}, failure(error)


def _settings(device: str, dtype: torch.dtype, effort: Effort) -> dict[str, str | int | float]:
    flops = {"flops_per_second": product_rate(device, dtype, effort)}
    if device == "cpu":
        return {**flops}
    return {"cudnn_benchmark": "on", "bytes_per_second": copy_bandwidth(device, effort), **flops}


def _candidates(
    variant: Variant,
    images: Tensor,
    modes: Sequence[Mode],
    asked: Sequence[Asked],
    references: dict[int, Reference],
) -> list[Candidate]:
    def wrong(call: Call) -> str:
        key = id(variant.plain)
        if key not in references:
            references[key] = Reference(copy.deepcopy(variant.plain).eval().to(images), images)
        logits = call()
        assert isinstance(logits, Tensor)
        return references[key].wrong(logits, times=2 if variant.library == "maxattn" else 4)

    def plain(mode: Mode) -> Call:
        return _call(variant.network.eval(), images, variant.layout, mode)

    def optimized(mode: Mode) -> Call:
        network = copy.deepcopy(variant.plain).eval().to(images)
        return _inferring(optimize_for_inference(network, compile=mode == "compiled"), images)

    def attention(make: Callable[[Mode], Call], mode: Mode) -> str:
        if variant.library != "maxattn":
            return ""
        recorded = make is optimized and gpu.made_for(images)  # not compiled, so the choice is made in eager code
        return attention_backends(asked, compiling=mode == "compiled" and not recorded)

    made = {variant.name: plain}
    if variant.library == "maxattn":
        made = {"maxattn plain": plain, "maxattn optimized": optimized}
    return [
        Candidate(
            name=f"{name}, {mode}",
            library=variant.library,
            mode=mode,
            make=partial(make, mode),
            wrong=wrong,
            attention=attention(make, mode),
            shares_graphs=mode == "compiled" and images.is_cuda and not (make is optimized and gpu.made_for(images)),
        )
        for name, make in made.items()
        for mode in modes
    ]


def _other(name: str, spec: MaxViTSpec, images: Tensor, modes: Sequence[Mode]) -> list[Candidate]:
    """Another architecture of timm, in both memory layouts."""

    def make(layout: str, mode: Mode) -> Call:
        try:
            network = timm_network(name, pair(spec.img_size), num_classes=spec.num_classes)
        except LookupError as reason:
            raise NotMeasured(*reason.args) from None
        return _call(network.eval(), images, layout, mode)

    return [
        Candidate(
            name=f"{name}, {layout}, {mode}",
            library=name,
            mode=mode,
            make=partial(make, layout, mode),
            note=UNCHECKED,
            shares_graphs=mode == "compiled" and images.is_cuda,
        )
        for layout in LAYOUTS
        for mode in modes
    ]


def _call(network: nn.Module, images: Tensor, layout: str, mode: Mode) -> Call:
    network, images = laid_out(network, images, layout)
    return _inferring(compiled(network, images.device.type) if mode == "compiled" else network, images)


def _inferring(function: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(images)

    return call
