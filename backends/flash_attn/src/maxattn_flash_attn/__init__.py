"""The backend `flash_attn` of maxattn: windows through flash-attn 2, 3 or 4, which is imported at first use."""

from __future__ import annotations

from maxattn.hookspecs import hookimpl
from maxattn.ops.contract import Backend
from maxattn_flash_attn.backend import FlashAttn

__version__ = "0.1.0"
__all__ = ["FlashAttn", "maxattn_backends"]


@hookimpl
def maxattn_backends() -> list[Backend]:
    return [FlashAttn()]
