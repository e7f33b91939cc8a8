"""The hooks a plugin may implement."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from maxattn.ops.contract import Backend

hookspec = pluggy.HookspecMarker("maxattn")
hookimpl = pluggy.HookimplMarker("maxattn")


@hookspec
def maxattn_backends() -> Sequence[Backend]:
    """Return instances of the backends that this plugin provides."""
    raise NotImplementedError
