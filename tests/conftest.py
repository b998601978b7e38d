"""Makes the oracles importable from every test folder, and skips visible where they would hide a missing package; the
same examples in every run; Ctrl-C for the programs under test.

With MXCOMPILE_NO_SKIPS=1 (as CI sets it, where every package is installed) only a missing GPU, or something that
no package can bring (marker ``machine``), excuses a test; any other skip is a failure.

Hypothesis draws the same examples each time, and no example has a deadline: a test that passed fails because of a change,
never of luck or of a busy machine. `pytest --hypothesis-profile=explore` (with `--hypothesis-seed=N` to choose) draws others.
"""

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent / "oracle"))

# What is started in the background of a shell ignores Ctrl-C and hands that down; the programs under test must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_NO_SKIPS = os.environ.get("MXCOMPILE_NO_SKIPS") == "1"
_EXCUSES = ("gpu", "machine")

# How long examples take says nothing about them.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip into a failure that repeats its reason."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"MXCOMPILE_NO_SKIPS=1 allows no skip here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    excused = any(item.get_closest_marker(name) for name in _EXCUSES)
    if _NO_SKIPS and report.skipped and not hasattr(report, "wasxfail") and not excused:
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if _NO_SKIPS and report.skipped:
        _refuse_skip(report)
    return report
