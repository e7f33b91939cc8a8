"""What is installed of NATTEN, told without importing it."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from maxattn.ops.contract import Reason
from maxattn.ops.libraries import has_module

OLDEST = (0, 21, 7)
"""Before it, gradients of windows that do not fill its kernels' tiles could be NaN; before 0.20 there is no stride."""

INSTALL = "pip install 'natten>=0.21.7'"


class Installed(NamedTuple):
    """The version of NATTEN ("" if it is not known, None if it is not there), and whether its CUDA kernels are."""

    version: str | None
    kernels: bool


@cache
def installed() -> Installed:
    """What of NATTEN is installed; imports nothing of it."""
    if not has_module("natten"):
        return Installed(None, False)
    kernels = has_module("natten.libnatten")
    try:
        return Installed(version("natten"), kernels)
    except PackageNotFoundError:
        return Installed("", kernels)


def missing(there: Installed) -> Reason | None:
    """Why there are no kernels that serve; None if there are."""
    if there.version is None:
        return Reason("not_installed", "natten is not installed", INSTALL)
    known = re.match(r"(\d+)\.(\d+)\.(\d+)", there.version)
    if known and tuple(map(int, known.groups())) < OLDEST:
        return Reason("version", f"natten {there.version} is too old", INSTALL)
    if not there.kernels:
        told = "natten is installed without libnatten, its CUDA kernels"
        return Reason("not_installed", told, "install one of its builds for your PyTorch and CUDA: natten.org/install")
    return None
