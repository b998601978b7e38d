"""The environment in which tests start the real command."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, able to import this tree from any folder."""
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | extra
