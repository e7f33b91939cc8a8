"""Time and memory against the pixels of an image: windows of a fixed size, and full attention beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from maxattn.bench.attention import attention_backends, attention_problems
from maxattn.bench.compare import Candidate, NotMeasured, Show, Span, compare, silent
from maxattn.bench.machine import memory_bytes, this_machine
from maxattn.bench.networks import (
    Reference,
    case_facts,
    images_of,
    randomised,
)
from maxattn.bench.results import Keep, Mode, Result, Row, lose
from maxattn.bench.timing import Call, Effort, release, wall_clock
from maxattn.build import build
from maxattn.inference import optimize_for_inference
from maxattn.nn import MaxViT
from maxattn.presets import load_spec
from maxattn.spec import MaxViTSpec, pair

SIZES = (224, 320, 448, 640, 896, 1280, 1792, 2560, 3584, 4096)
"""Sides of the images; from one to the next the pixels double."""
WINDOWS, FULL = "windows", "full attention"
POWER = {WINDOWS: 1, FULL: 2}
"""How time is expected to grow with the pixels; memory grows linearly in both."""


def measure(
    source: str | Path | MaxViTSpec,
    *,
    sizes: Sequence[int] = SIZES,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_seconds: float = 60.0,
    effort: Effort | None = None,
    show: Show = silent,
    keep: Keep = lose,
) -> Result:
    """The network made for inference on growing images; and the same one whose windows are the whole feature map.

    On a GPU each size is replayed as a CUDA graph. Full attention has no position bias, which would alone be of
    `pixels ** 2` numbers: its memory is linear then, and its time quadratic. Larger images are left out once a call
    would take more than `max_seconds`, or more than half of the memory that is free. The logits at the smallest size
    are checked against the plain networks' in fp64.

    Raises:
        ValueError: if the sizes are not increasing.

    Example:
        >>> result = measure("nano", sizes=[28, 56], effort=Effort(least=2, most=2, sample=0))
        >>> [(row.case["img_size"], row.candidate) for row in result.rows]
        [(28, 'windows'), (28, 'full attention'), (56, 'windows'), (56, 'full attention')]
    """
    effort = effort or Effort(least=3, most=10)
    if list(sizes) != sorted(set(sizes)) or not sizes:
        raise ValueError(f"sizes must be increasing, not {', '.join(map(str, sizes))}")
    base = load_spec(source)
    windows = randomised(build(base, drop_path_rate=0.0)).eval().to(device, dtype)
    settings: dict[str, str | int | float] = {"max_seconds": max_seconds}
    result = Result(kind="scaling", machine=this_machine(device), settings=settings, checked=True, finished=False)
    last: dict[str, Row] = {}
    for number, size in enumerate(sizes):
        span = Span(show).part(number, len(sizes))
        spec = base.override(img_size=size)
        candidates = [
            _candidate(name, spec, windows, batch, dtype, device, check=number == 0, expected=expected)
            for name in POWER
            for expected in [_too_large(name, last.get(name), size, device, max_seconds)]
        ]
        case = case_facts(spec, batch, dtype)
        found = compare(case, candidates, device, effort, partial(wall_clock, device=device, effort=effort), span)
        last |= {row.candidate: row for row in found if row.time is not None}
        result = result.plus(found)
        keep(result)
        release(device)
    result = replace(result, finished=True)
    keep(result)
    return result


def exponent(rows: Sequence[Row], what: str) -> float | None:
    """The slope of `time` or `mib` against the pixels, both as logarithms, by least squares; None of fewer than two.

    1 is linear growth, 2 quadratic. Small images do not fill a machine: give the larger ones.

    Example:
        >>> rows = [Row(case={"img_size": n}, candidate="windows", mib=3.0 * n**2) for n in (224, 448, 896)]
        >>> round(exponent(rows, "mib"), 6)
        1.0
    """
    points = [(math.log(pixels(row)), math.log(value)) for row in rows if (value := value_of(row, what)) is not None]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def value_of(row: Row, what: str) -> float | None:
    if what == "mib":
        return row.mib
    return None if row.time is None else row.time.median


def pixels(row: Row) -> int:
    """Of one image of the row's case."""
    height, width = pair_of(row.case["img_size"])
    return height * width


def pair_of(size: str | int) -> tuple[int, int]:
    """A side, or `HxW` as cases tell it, as a pair.

    Example:
        >>> pair_of(224), pair_of("7x5")
        ((224, 224), (7, 5))
    """
    height, _, width = str(size).partition("x")
    return int(height), int(width or height)


def _too_large(name: str, last: Row | None, size: int, device: str, max_seconds: float) -> str:
    """Why images of this size are left out, going by the last that were not; empty if they are not."""
    if last is None or last.time is None or last.mib is None:
        return ""
    growth = size**2 / pixels(last)
    time, mib = last.time.median * growth ** POWER[name], last.mib * growth
    free = _free_bytes(device) / 2**20
    if time > max_seconds:
        return f"left out: a call would take about {time:.0f} s"
    if free and mib > free / 2:
        return f"left out: a call would take about {mib / 1024:.0f} GiB"
    return ""


def _free_bytes(device: str) -> int:
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return memory_bytes("MemAvailable")


def _candidate(
    name: str,
    spec: MaxViTSpec,
    windows: MaxViT,
    batch: int,
    dtype: torch.dtype,
    device: str,
    *,
    check: bool,
    expected: str,
) -> Candidate:
    own = spec if name == WINDOWS else _full_attention(spec)
    networks: list[MaxViT] = []

    def make() -> Call:
        if expected:
            raise NotMeasured(expected)
        network = windows if name == WINDOWS else _with_weights_of(windows, own)
        if check:
            networks.append(network)
        # As a CUDA graph: called one by one, the kernels of small images take the host longer than the GPU.
        fast = optimize_for_inference(network, compile=device != "cpu")
        images = images_of(spec, batch, dtype, device)

        def call() -> torch.Tensor:
            with torch.no_grad():
                return fast(images)

        return call

    def wrong(call: Call) -> str:
        if not networks:
            return ""
        return Reference(networks[0], images_of(spec, batch, dtype, device)).wrong(call())  # type: ignore[arg-type]

    attention = "" if expected else attention_backends(attention_problems(own, batch, dtype, device))
    mode: Mode = "eager" if device == "cpu" else "recorded"
    return Candidate(name=name, make=make, mode=mode, wrong=wrong, attention=attention)


def _full_attention(spec: MaxViTSpec) -> MaxViTSpec:
    """Without position bias, windows as large as the feature maps of images of the spec's size."""
    size = tuple(-(-side // spec.stem.stride) for side in pair(spec.img_size))
    whole = {}
    for number, stage in enumerate(spec.stages):
        size = tuple(-(-side // stage.stride) for side in size)
        whole[f"stages.{number}.window"] = size
    return spec.override(rel_pos="none", drop_path_rate=0.0, **whole)


def _with_weights_of(windows: MaxViT, spec: MaxViTSpec) -> MaxViT:
    """A network without position bias, of the same weights otherwise."""
    full = build(spec)
    weights = {name: tensor for name, tensor in windows.state_dict().items() if ".rel_pos." not in name}
    full.load_state_dict(weights)
    weight = next(windows.parameters())
    return full.eval().to(weight.device, weight.dtype)
