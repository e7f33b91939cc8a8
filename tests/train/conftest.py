from __future__ import annotations

from pathlib import Path

import pytest
from tiny_training import write_stripes


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that nobody writes to."""
    return write_stripes(tmp_path_factory.mktemp("stripes"))
