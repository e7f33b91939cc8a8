"""Figures that the documentation quotes are those of the results in `docs/benchmarks`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
H200 = json.loads((REPOSITORY / "docs" / "benchmarks" / "results" / "nvidia-h200-op.json").read_text("utf-8"))
SHAPES = ((56, 7), (28, 7), (14, 7), (7, 7), (64, 8), (96, 12), (56, 14), (64, 16), (112, 28))
"""Pixels and tokens of a side."""


def microseconds(size: int, window: int, what: str, candidate: str, bias: str) -> float:
    def is_it(row: dict[str, Any]) -> bool:
        case = row["case"]
        where = case["size"], case["window"], case["axis"], case["bias"], case["pass"]
        return where == (size, window, "block", bias, what) and row["candidate"] == candidate

    (row,) = filter(is_it, H200["rows"])
    return float(row["time"]["median"]) * 1e6


def ratios(
    size: int, window: int, over: str, under: str, decimals: int | None = 2, bias: str = "float32"
) -> tuple[str, str]:
    """How many times as long `over` takes as `under`, forward and in training; two digits if no decimals are given."""
    pair = [
        microseconds(size, window, what, over, bias) / microseconds(size, window, what, under, bias) for what in PASSES
    ]
    first, second = (f"{ratio:.{decimals if decimals is not None else int(ratio < 9.95)}f}" for ratio in pair)
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


WITH_BIAS = ("triton", "flex", "xformers", "naive+compile")


@pytest.mark.parametrize(("bias", "names"), [("float32", WITH_BIAS), ("none", WITH_BIAS[:3])])
def test_the_guide_quotes_which_backend_is_fastest(bias: str, names: tuple[str, ...]) -> None:
    rows = []
    for size, window in SHAPES:
        (a, b), *others = (ratios(size, window, "sdpa", name, None, bias) for name in names)
        told = " | ".join(", ".join(pair) for pair in others)
        rows.append(f"| {window}, {size} x {size} | **{a}**, **{b}** | {told} |")
    assert_quoted(rows, "docs/guide/backends.md")
