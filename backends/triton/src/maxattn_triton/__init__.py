"""The backend `triton` of maxattn: Max-SA in one kernel, straight on the image; triton is imported at first use."""

from __future__ import annotations

from maxattn.hookspecs import hookimpl
from maxattn.ops.contract import Backend
from maxattn_triton.backend import Triton

__version__ = "0.1.0"
__all__ = ["Triton", "maxattn_backends"]


@hookimpl
def maxattn_backends() -> list[Backend]:
    return [Triton()]
