"""Where memory-efficient attention lives: up to xFormers 0.0.35 in xFormers itself, later in the package mslk."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor

from maxattn.ops.contract import Reason

OLDEST = (0, 0, 34)
"""The first xFormers for the versions of PyTorch that maxattn needs."""

INSTALL = "pip install 'xformers>=0.0.35'"


class Installed(NamedTuple):
    """What is installed: the version of xFormers ("" if it is not known, None if it is not there), and the rest."""

    xformers: str | None
    needs_mslk: bool
    mslk: bool


@cache
def installed() -> Installed:
    """What of xFormers and mslk is installed; imports neither."""
    mslk = find_spec("mslk") is not None
    if find_spec("xformers") is None:
        return Installed(None, False, mslk)
    try:
        found = distribution("xformers")
    except PackageNotFoundError:
        return Installed("", False, mslk)
    needs = any(re.match(r"mslk\b", required) for required in found.requires or ())
    return Installed(found.version, needs, mslk)


def missing(there: Installed) -> Reason | None:
    """Why there are no kernels; None if there are."""
    if there.xformers is None:
        return None if there.mslk else Reason("not_installed", "xformers is not installed", INSTALL)
    if there.needs_mslk and not there.mslk:
        told = f"xformers {there.xformers} takes its attention from mslk, which is not installed"
        return Reason(
            "not_installed", told, "install mslk as PyTorch publishes it: elsewhere its name is an empty package"
        )
    known = re.match(r"(\d+)\.(\d+)\.(\d+)", there.xformers)
    if known and tuple(map(int, known.groups())) < OLDEST:
        told = f"xformers {there.xformers} is too old for this PyTorch"
        return Reason("version", told, f"from {'.'.join(map(str, OLDEST))}")
    return None


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float, scale: float
) -> Tensor:
    """Attention of `(windows, tokens, heads, head_dim)` with a bias `(windows, heads, tokens, tokens)`.

    Always by the one kernel that takes a tensor as bias, CUTLASS's.
    """
    fmha = _fmha()
    out: Tensor = fmha.memory_efficient_attention(
        q, k, v, bias, dropout_p, scale, op=fmha.MemoryEfficientAttentionCutlassOp
    )
    return out


def _fmha() -> Any:
    return import_module("mslk.attention.fmha" if installed().xformers is None else "xformers.ops.fmha")
