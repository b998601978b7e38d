"""A pytest plugin (`-p pytest_progress`) that writes each test's outcome as it ends, for supervise.py.

After a failure it asks whether the GPU still answers; if not, the process ends, and the tests that are left run in a new one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from supervise import Progress

PROGRESS_VARIABLE = "MXC_PROGRESS"
CONTEXT_LOST = 86

_progress = Progress(os.environ.get(PROGRESS_VARIABLE, os.devnull))
_outcomes: dict[str, dict[str, Any]] = {}


def pytest_runtest_logstart(nodeid: str) -> None:
    _progress.start(nodeid)
    _outcomes[nodeid] = {"outcome": "passed", "seconds": 0.0}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    record = _outcomes[report.nodeid]
    record["seconds"] = round(record["seconds"] + report.duration, 2)
    if report.outcome != "passed":
        record["outcome"] = report.outcome
        record["text"] = str(report.longrepr)[-600:]


def pytest_runtest_logfinish(nodeid: str) -> None:
    record = _outcomes.pop(nodeid)
    _progress.end(nodeid, record)
    if record["outcome"] == "failed" and not _gpu_answers():
        os._exit(CONTEXT_LOST)


def _gpu_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True  # nothing to lose
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False
