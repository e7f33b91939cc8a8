"""Figures that the documentation quotes are those of the results in `docs/benchmarks`."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from maxattn.bench.dispatch import ADDED
from maxattn.bench.results import Result, Row
from maxattn.bench.tables import slopes
from maxattn.ops.contract import Axis, MeasuredSpeed, Problem
from maxattn_flash_attn import backend as flash_attn
from maxattn_flex import backend as flex
from maxattn_triton import backend
from maxattn_xformers import backend as xformers

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "docs" / "benchmarks" / "results"
SHAPES = ((56, 7), (28, 7), (14, 7), (7, 7), (64, 8), (96, 12), (56, 14), (64, 16), (112, 28))
"""Pixels and tokens of a side."""


@cache
def result(machine: str, kind: str) -> Result:
    return Result.read(RESULTS / f"{machine}-{kind}.json")


def rows_of(machine: str, kind: str, **case: Any) -> list[Row]:
    """Those with a time, of cases with these facts."""
    rows = result(machine, kind).rows
    return [row for row in rows if row.time is not None and case.items() <= row.case.items()]


def microseconds(size: int, window: int, what: str, candidate: str, bias: str, axis: str = "block") -> float:
    """NaN for what `flash_attn` was not able to, and for what `xformers` was not timed at."""
    case = {"size": size, "window": window, "axis": axis, "bias": bias, "pass": what}
    times = [row.time for row in rows_of("nvidia-h200", "op", **case) if row.candidate == candidate]
    assert len(times) == 1 or candidate == "flash_attn" or (candidate, axis) == ("xformers", "grid")
    return times[0].median * 1e6 if times and times[0] else math.nan


def ratios(
    size: int, window: int, over: str, under: str, decimals: int | None = 2, bias: str = "float32"
) -> tuple[str, str]:
    """How many times as long `over` takes as `under`, forward and in training; two digits if no decimals are given."""
    pair = [
        microseconds(size, window, what, over, bias) / microseconds(size, window, what, under, bias) for what in PASSES
    ]
    digits = [decimals if decimals is not None else int(ratio < 9.95) for ratio in pair]
    first, second = ("-" if math.isnan(ratio) else f"{ratio:.{n}f}" for ratio, n in zip(pair, digits, strict=True))
    return first, second


PASSES = ("forward", "training")


def assert_quoted(rows: list[str], path: str) -> None:
    text = (REPOSITORY / path).read_text("utf-8")
    assert not [row for row in rows if row not in text], "the page should have:\n" + "\n".join(rows)


def test_the_readme_of_triton_quotes_its_distance_from_the_floor() -> None:
    goals = {
        (56, 7): "1.15 | {} | 1.3",
        **dict.fromkeys([(28, 7), (14, 7), (7, 7), (64, 8)], "1.3 | {} | 1.5"),
        (96, 12): "2 | {} | 2.5",
    }
    rows = []
    for size, window in SHAPES:
        forward, training = ratios(size, window, "triton", "floor")
        towards = goals.get((size, window), "- | {} | -").format(training)
        sdpa = ", ".join(ratios(size, window, "sdpa", "triton", None))
        rows.append(f"| {size}, {window} | {forward} | {towards} | {sdpa} |")
    assert_quoted(rows, "backends/triton/README.md")


OTHERS = ("triton", "flex", "xformers", "flash_attn")


@pytest.mark.parametrize(("bias", "names"), [("float32", (*OTHERS, "naive+compile")), ("none", OTHERS)])
def test_the_guide_quotes_which_backend_is_fastest(bias: str, names: tuple[str, ...]) -> None:
    rows = []
    for size, window in SHAPES:
        (a, b), *others = (ratios(size, window, "sdpa", name, None, bias) for name in names)
        told = " | ".join(", ".join(pair) for pair in others)
        rows.append(f"| {window}, {size} x {size} | **{a}**, **{b}** | {told} |")
    assert_quoted(rows, "docs/guide/backends.md")


def test_the_readme_of_flash_attn_quotes_how_fast_it_is() -> None:
    def span(what: str, bias: str) -> list[float]:
        pairs = [
            [microseconds(size, window, what, name, bias) for name in ("sdpa", "flash_attn")] for size, window in SHAPES
        ]
        found = [sdpa / flash for sdpa, flash in pairs if not math.isnan(flash)]
        return [min(found), max(found)]

    told = " to ".join(f"{ratio:.2f}" for ratio in span("training", "none"))
    forward = " to ".join(f"{ratio:.2f}" for ratio in span("forward", "none"))
    both = [*span("forward", "float32"), *span("training", "float32")]
    text = " ".join((REPOSITORY / "backends" / "flash_attn" / "README.md").read_text("utf-8").split())
    assert f"without a bias in training {told} times as fast as `sdpa`, forward {forward} times" in text
    assert f"are wider, {min(both):.2f} to {max(both):.2f} times" in text


HOSTS = ("amd-epyc-2-cores", "intel-xeon-16-cores")


def times_as_fast(rows: list[Row], mode: str, *libraries: str) -> str:
    """How many times as fast our fastest is as the fastest of others."""
    ours, theirs = (
        min(row.time.median for row in rows if row.time and row.mode == mode and row.library in names)
        for names in (("maxattn",), libraries)
    )
    return f"{theirs / ours:.2f}"


def against(goal: float, seen: str) -> str:
    return f"{goal:g} | {seen}{'' if float(seen) >= goal else ', missed'} |"


def both(goal: float, *seen: str) -> str:
    """Eager and compiled."""
    missed = [how for how, one in zip(("eager", "compiled"), seen, strict=True) if float(one) < goal]
    return f"{goal:g} | {', '.join(seen)}{', missed ' * bool(missed)}{' and '.join(missed)} |"


def within(goal: float, *seen: str) -> str:
    """Shares, which a goal is the most of; the last of several is with PyTorch's default."""
    missed = [f", missed{' with the default' * (one != seen[0])}" for one in seen if float(one) > goal]
    return f"{goal:g} | {', '.join(seen)}{''.join(missed[:1])} |"


def test_the_guide_quotes_how_fast_networks_are() -> None:
    tiny, base, large = (rows_of("nvidia-h200", "model", img_size=size) for size in (224, 384, 512))
    step = rows_of("nvidia-h200", "train")
    mib = {row.candidate: row.mib for row in step if row.mib is not None}

    def share(mode: str) -> str:
        return f"{mib[f'maxattn, {mode}'] / mib[f'timm, channels-last, {mode}']:.2f}"

    settings = result("nvidia-h200", "train").settings
    fixed = f"{float(settings['fixed_segments_mib']) / float(settings['fixed_segments_timm_mib']):.2f}"
    graphless_times = [row.time for row in step if row.time and row.mode == "compiled"]
    quartiles = [f"{1e3 * seconds:.0f}" for time in graphless_times for seconds in (time.low, time.high)]
    recorded, graphless = (times_as_fast(step, mode, "timm") for mode in ("recorded", "compiled"))
    one, eight = (rows_of("amd-epyc-2-cores", "model", img_size=224, dtype="float32", batch=n) for n in (1, 8))
    others = [
        [
            times_as_fast(rows_of("amd-epyc-2-cores", "model", **case, batch=n), mode, "timm", "torchvision")
            for mode in modes
            for n in (1, 8)
        ]
        for case, modes in (
            ({"dtype": "bfloat16", "img_size": 224}, ["eager"]),
            ({"dtype": "float32", "img_size": 384}, ["eager"]),
            ({"dtype": "bfloat16", "img_size": 384}, ["eager", "compiled"]),
        )
    ]
    on_cpu = [
        [times_as_fast(rows, mode, "timm", "torchvision") for mode in ("eager", "compiled")] for rows in (one, eight)
    ]
    windows = slopes(rows_of("nvidia-h200", "scaling"))
    added = [
        max(row.time.median for row in rows_of(host, "dispatch", measured=ADDED) if row.time and row.mode != "compiled")
        for host in HOSTS
    ]
    guards = [
        next(
            row.time.median for row in rows_of(host, "dispatch", measured=ADDED) if row.time and row.mode == "compiled"
        )
        for host in HOSTS
    ]
    quoted = [
        f"batch 256: times as fast as timm | {against(2, times_as_fast(tiny, 'compiled', 'timm'))}",
        f"Swin-T of timm | {against(1, times_as_fast(tiny, 'compiled', 'swin_tiny_patch4_window7_224'))}",
        f"MaxViT-B at 384, the same, as timm | {against(2.5, times_as_fast(base, 'compiled', 'timm'))}",
        f"MaxViT-T at 512, the same | {against(2.5, times_as_fast(large, 'compiled', 'timm'))}",
        f"batch 128: times as fast as timm, as CUDA graphs too | {against(1.6, recorded)}",
        f"with segments that grow, with PyTorch's default | {within(0.6, share('recorded'), fixed)}",
        f"compiled without CUDA graphs: times as fast as timm | {against(1.6, graphless)}",
        f"| its peak memory, as a share of timm's | {within(0.6, share('compiled'))}",
        "its quartiles are {} and {} ms, timm's {} and {}.".format(*quartiles),
        f"batch 1: eager, compiled | {both(1.5, *on_cpu[0])}",
        f"| batch 8 | {both(1.5, *on_cpu[1])}",
        f"| in bf16, eager, batches 1 and 8 | - | {', '.join(others[0])} |",
        f"| at 384 in fp32, eager, batches 1 and 8, as timm | - | {', '.join(others[1])} |",
        f"| at 384 in bf16, as timm: eager, batches 1 and 8, compiled, the same | - | {', '.join(others[2])} |",
        f"H200: time, memory | 1 | {windows['windows', 'time']:.2f}, {windows['windows', 'mib']:.2f} |",
        f"as pixels to the power of {windows['full attention', 'time']:.2f}.",
        f"| 5 us | {', '.join(f'{1e6 * seconds:.1f} us' for seconds in added)} |",
        f"guards take {', '.join(f'{1e6 * seconds:.1f} us' for seconds in guards)} a call |",
    ]
    assert_quoted(quoted, "docs/guide/performance.md")
    inference = [float(times_as_fast(rows, "compiled", "timm")) for rows in (tiny, base, large)]
    training = float(times_as_fast(step, "recorded", "timm"))
    in_short = [f"{min(inference):.1f} to {max(inference):.1f} times as fast in inference, {training:.2f} times in"]
    assert_quoted(in_short, "README.md")
    of_memory = f"{training:.2f} times as fast as timm's on an H200, in {share('recorded')} of the memory."
    assert_quoted([of_memory], "CHANGELOG.md")
    grown = mib["maxattn, recorded"] / float(settings["fixed_segments_mib"])
    assert_quoted([f"takes [{grown:.2f} of the memory](performance.md)"], "docs/guide/training.md")


def test_the_guide_quotes_what_a_training_step_spends() -> None:
    ms = result("nvidia-h200", "train").settings
    pixels = 128 * 112 * 112 * 256
    quoted = [
        f"of {ms['kernels_before_ms']:.0f} ms that its kernels took",
        f"took {ms['norms_before_ms']}, cuDNN's depthwise convolutions {ms['depthwise_before_ms']}",
        f"ours takes {ms['fixed_segments_mib']:,} MiB then, timm's {ms['fixed_segments_timm_mib']:,}.",
        f"was {ms['held_mib']:,} MiB of ours and {ms['held_timm_mib']:,} of timm's with segments that grow",
        f"{ms['held_fixed_segments_mib']:,} and {ms['held_fixed_segments_timm_mib']:,} with the default",
        f"A step's kernels took {ms['kernels_ms']:.0f} ms",
        f"take {ms['input_gradient_ms']} ms where cuDNN's take {ms['input_gradient_by_cudnn_ms']}",
        f"at {ms['input_gradient_tb_per_s']} TB/s",
        f"take {ms['sums_ms']} ms there, at {2 * pixels * 2 / float(ms['sums_ms']) / 1e9:.1f} TB/s",
        f"takes {ms['largest_pass_ms']} ms, at {4 * pixels * 2 / float(ms['largest_pass_ms']) / 1e9:.1f} TB/s",
    ]
    text = " ".join((REPOSITORY / "docs" / "guide" / "performance.md").read_text("utf-8").split())
    assert not [one for one in quoted if one not in text], quoted


AXES: tuple[Axis, ...] = ("block", "grid")
MEASURED: dict[str, dict[Axis, MeasuredSpeed]] = {
    "triton": backend.MEASURED,
    "flex": dict.fromkeys(AXES, flex.MEASURED),
    "xformers": dict.fromkeys(AXES, xformers.MEASURED),
    "flash_attn": dict.fromkeys(AXES, flash_attn.MEASURED),
}
TIE = 0.03
"""By how much what is chosen first for grid may be the slower one: 1 in 30, to which times of two runs agree."""
LIFTED = 224
"""Tokens up to which a bias fits flash-attn's head dims beside 32 channels."""
TOKENS = {"up to 49": 7, "to 64": 8, "to 144": 12, "to 256": 16, "more": 28}


def problem_of(window: int, bias: str, what: str, axis: Axis = "block") -> Problem:
    return Problem(
        axis=axis, window=(window, window), batch=1, height=window, width=window, heads=1, head_dim=32,
        bias=torch.float32 if bias == "float32" else None, requires_grad=what == "training",
    )  # fmt: skip


def automatic_order(window: int, bias: str, what: str, axis: Axis = "block") -> list[str]:
    """The backends for a GPU, the one that is chosen first."""
    problem = problem_of(window, bias, what, axis)
    able = {name for name in MEASURED if name != "flash_attn" or problem.bias is None or problem.tokens <= LIFTED}
    speeds = {"sdpa": 1.0} | {name: MEASURED[name][axis].of(problem) for name in able}
    return sorted(speeds, key=lambda name: -speeds[name])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("bias", ["float32", "none"])
@pytest.mark.parametrize(("size", "window"), SHAPES)
def test_the_automatic_order_is_that_of_the_measurements(
    size: int, window: int, bias: str, what: str, axis: Axis
) -> None:
    order = automatic_order(window, bias, what, axis)
    times = [microseconds(size, window, what, name, bias, axis) for name in order]
    timed = [time for time in times if not math.isnan(time)]
    assert len(timed) >= 3
    more = 1 + (TIE if axis == "grid" else 0)
    assert all(first <= second * more for first, second in pairwise(timed)), dict(zip(order, times, strict=True))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("bias", ["float32", "none"])
@pytest.mark.parametrize("name", MEASURED)
def test_speeds_are_those_of_the_measurements(name: str, bias: str, what: str, axis: Axis) -> None:
    """One for all windows of as many tokens: not less than the least of them, nor more than the most."""
    found: dict[float, list[float]] = {}
    for size, window in SHAPES:
        if name != "flash_attn" or bias == "none" or window**2 <= LIFTED:
            told = MEASURED[name][axis].of(problem_of(window, bias, what, axis))
            seen, own = (microseconds(size, window, what, one, bias, axis) for one in ("sdpa", name))
            found.setdefault(told, []).extend([] if math.isnan(own) else [seen / own])
    for told, seen_of_it in found.items():
        if seen_of_it:
            assert min(seen_of_it) - 0.05 * told <= told <= max(seen_of_it) + 0.05 * told, (told, seen_of_it)


def test_the_guide_tells_the_automatic_order() -> None:
    lines = []
    for told, window in TOKENS.items():
        orders = [automatic_order(window, bias, what) for bias in ("float32", "none") for what in PASSES]
        assert {order[0] for order in orders} == {"triton"}
        cells = [", ".join(f"`{name}`" for name in order[1:]) for order in orders]
        lines.append(f"| {told} | {' | '.join(cells)} |")
    assert_quoted(lines, "docs/guide/backends.md")
    differ = [
        (window, bias, what)
        for window in TOKENS.values()
        for bias in ("float32", "none")
        for what in PASSES
        if automatic_order(window, bias, what, "grid") != automatic_order(window, bias, what)
    ]
    assert differ == [(28, "none", "training")]
    assert automatic_order(28, "none", "training", "grid")[:2] == ["flash_attn", "triton"]
