"""The backend `xformers` of maxattn: windows through memory-efficient attention, which is imported at first use."""

from __future__ import annotations

from maxattn.hookspecs import hookimpl
from maxattn.ops.contract import Backend
from maxattn_xformers.backend import Xformers

__version__ = "0.1.0"
__all__ = ["Xformers", "maxattn_backends"]


@hookimpl
def maxattn_backends() -> list[Backend]:
    return [Xformers()]
