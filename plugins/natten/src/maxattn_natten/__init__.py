"""The backend `natten` of maxattn: windows as neighbourhoods of the image. NATTEN is imported at first use."""

from __future__ import annotations

from maxattn.hookspecs import hookimpl
from maxattn.ops.contract import Backend
from maxattn_natten.backend import Natten

__version__ = "0.1.0"
__all__ = ["Natten", "maxattn_backends"]


@hookimpl
def maxattn_backends() -> list[Backend]:
    return [Natten()]
