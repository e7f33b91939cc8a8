"""The core's own backends, registered through the same hook as everybody's."""

from __future__ import annotations

from maxattn.hookspecs import hookimpl
from maxattn.ops.contract import Backend
from maxattn.ops.naive import Naive
from maxattn.ops.sdpa import Sdpa


@hookimpl
def maxattn_backends() -> list[Backend]:
    return [Naive(), Sdpa()]
