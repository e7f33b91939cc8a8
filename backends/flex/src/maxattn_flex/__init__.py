"""The backend `flex` of maxattn: windows through FlexAttention, which is imported at first use."""

from __future__ import annotations

from maxattn.hookspecs import hookimpl
from maxattn.ops.contract import Backend
from maxattn_flex.backend import Flex

__version__ = "0.1.0"
__all__ = ["Flex", "maxattn_backends"]


@hookimpl
def maxattn_backends() -> list[Backend]:
    return [Flex()]
