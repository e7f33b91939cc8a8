"""Whatever the backend declares holds."""

from __future__ import annotations

from collections.abc import Callable

from maxattn.testing import parametrize_with_backend_checks


@parametrize_with_backend_checks("template", examples=20)
def test_conformance(check: Callable[[], None]) -> None:
    check()
