"""The backend `template` of maxattn."""

from __future__ import annotations

from maxattn import Backend
from maxattn.hookspecs import hookimpl


@hookimpl
def maxattn_backends() -> list[Backend]:
    from maxattn_template.backend import TemplateBackend

    return [TemplateBackend()]
