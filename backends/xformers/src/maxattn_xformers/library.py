"""Where memory-efficient attention lives: up to xFormers 0.0.35 in xFormers itself, later in the package mslk."""

from __future__ import annotations

import json
import re
from ctypes import CDLL
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Reason
from maxattn.ops.libraries import has_module

OLDEST = (0, 0, 34)
"""The first xFormers for the versions of PyTorch that maxattn needs."""

INSTALL = "pip install 'xformers>=0.0.35'"


class Installed(NamedTuple):
    """What is installed: the version of xFormers ("" if it is not known, None if it is not there), and the rest.

    `lacks` is the library of another CUDA that xFormers was built for, if that is not here; `clash`, whether neither it
    nor mslk can be imported, as `clashes` has it.
    """

    xformers: str | None
    needs_mslk: bool
    mslk: bool
    lacks: str | None = None
    clash: bool = False


@cache
def installed() -> Installed:
    """What of xFormers and mslk is installed; imports neither."""
    mslk, clash = has_module("mslk"), clashes()
    found = find_spec("xformers")
    if found is None:
        return Installed(None, False, mslk, clash=clash)
    lacks = missing_cuda(Path(found.origin or ""), torch.version.cuda)
    try:
        known = distribution("xformers")
    except PackageNotFoundError:
        return Installed("", False, mslk, lacks, clash)
    needs = any(re.match(r"mslk\b", required) for required in known.requires or ())
    return Installed(known.version, needs, mslk, lacks, clash)


def clashes() -> bool:
    """Whether there is a package flash_attn without flash-attn 2 in it, which xFormers and mslk then fail to import."""
    return has_module("flash_attn") and not has_module("flash_attn.flash_attn_interface")


def missing_cuda(package: Path, cuda: str | None) -> str | None:
    """The runtime of CUDA that the binary part of xFormers needs, if PyTorch's is another and it is not here.

    `package` is the package's `__init__.py`; beside it xFormers says what it was built for. It refuses all work where
    its binary part does not load.
    """
    try:
        built_for = json.loads((package.parent / "cpp_lib.json").read_text())["version"]["cuda"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(built_for, int) or cuda is None or built_for // 100 == int(cuda.split(".")[0]):
        return None
    name = f"libcudart.so.{built_for // 100}"
    try:
        CDLL(name)
    except OSError:
        return name
    return None


def missing(there: Installed) -> Reason | None:
    """Why there are no kernels; None if there are."""
    if there.xformers is None and not there.mslk:
        return Reason("not_installed", "xformers is not installed", INSTALL)
    if there.clash:
        told = "xformers cannot be imported where flash-attn 4 is installed without flash-attn 2"
        return Reason("version", told, "pip install flash-attn, or pip uninstall flash-attn-4")
    if there.xformers is None:
        return None
    if there.needs_mslk and not there.mslk:
        told = f"xformers {there.xformers} takes its attention from mslk, which is not installed"
        return Reason(
            "not_installed", told, "install mslk as PyTorch publishes it: elsewhere its name is an empty package"
        )
    known = re.match(r"(\d+)\.(\d+)\.(\d+)", there.xformers)
    if known and tuple(map(int, known.groups())) < OLDEST:
        told = f"xformers {there.xformers} is too old for this PyTorch"
        return Reason("version", told, f"from {'.'.join(map(str, OLDEST))}")
    if there.lacks is not None:
        told = f"xformers {there.xformers} was built for another CUDA, and {there.lacks} is not here"
        return Reason("version", told, "an xformers that was built for the CUDA of this PyTorch")
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
