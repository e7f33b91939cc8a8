"""Backends to choose between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from recording import Recording

from maxattn.ops.registry import registered


@pytest.fixture
def a() -> Iterator[Recording]:
    with registered(Recording("a")) as backend:
        yield backend


@pytest.fixture
def b() -> Iterator[Recording]:
    with registered(Recording("b")) as backend:
        yield backend
