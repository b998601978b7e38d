"""The small engine, built once for all tests of engines."""

from __future__ import annotations

import pytest
from small_engine import SmallEngine, build_small


@pytest.fixture(scope="session")
def small_engine(tmp_path_factory: pytest.TempPathFactory) -> SmallEngine:
    """Do not write into it."""
    return build_small(tmp_path_factory.mktemp("small"))
