"""Reading the values of options; an unreadable one is told with the option, the value and what would work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import typer
import yaml

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
PAIR = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def size(text: str, option: str) -> tuple[int, int]:
    """A height and a width: `7x5`, or `7` for both.

    Example:
        >>> size("7x5", "--window"), size("7", "--window")
        ((7, 5), (7, 7))
    """
    match = PAIR.fullmatch(text.strip() if "x" in text else f"{text.strip()}x{text.strip()}")
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is no size: give HxW, such as 7x5, or one number for both", param_hint=option
        )
    return int(match[1]), int(match[2])


def dtype(text: str, option: str) -> torch.dtype:
    """A dtype by torch's name or the usual short one.

    Example:
        >>> dtype("bf16", "--dtype")
        torch.bfloat16
    """
    if text not in DTYPES:
        raise typer.BadParameter(f"{text!r} is no dtype: give one of {', '.join(DTYPES)}", param_hint=option)
    return DTYPES[text]


def device(text: str, option: str) -> torch.device:
    """A kind of device as torch names it: `cpu`, `cuda`."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.index is not None:
        raise typer.BadParameter(f"{text!r} is no kind of device: give one such as cpu or cuda", param_hint=option)
    return found


def compute_capability(text: str, option: str) -> tuple[int, int]:
    """A compute capability as NVIDIA writes it.

    Example:
        >>> compute_capability("9.0", "--compute-capability")
        (9, 0)
    """
    match = re.fullmatch(r"(\d+)\.(\d)", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no compute capability: give MAJOR.MINOR, such as 9.0", param_hint=option)
    return int(match[1]), int(match[2])


def settings(assignments: Sequence[str], option: str) -> dict[str, Any]:
    """Fields and values from `field=value` texts; a value is YAML, or a size such as `7x5`.

    Example:
        >>> settings(["window=7x5", "stages.0.depth=3", "head={kind: linear}"], "--set")
        {'window': [7, 5], 'stages.0.depth': 3, 'head': {'kind': 'linear'}}
    """
    found = {}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals or not field.strip():
            raise typer.BadParameter(f"{assignment!r} is no field=value, such as stages.0.depth=3", param_hint=option)
        found[field.strip()] = _value(text.strip(), assignment, option)
    return found


def _value(text: str, assignment: str, option: str) -> Any:
    pair = PAIR.fullmatch(text)
    if pair is not None:
        return [int(pair[1]), int(pair[2])]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"the value in {assignment!r} is no YAML: {error}", param_hint=option) from None
