"""Shared by the plugin tests: one build of the library for a single architecture, and the GPU marker."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from plugins.build import BuildResult, build
from plugins.errors import ToolchainError
from plugins.library import Library, load

# One architecture, the cheapest to compile; the command `python -m plugins.build` compiles all of them.
TEST_ARCHITECTURES = tuple(os.environ.get("MXCOMPILE_TEST_ARCHS", "80").split(","))
TEST_BUILD_DIR = Path(__file__).parents[2] / "build" / "plugins-test"


def _no_gpu() -> str | None:
    """Why GPU tests cannot run, or None where there is a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "no NVIDIA GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"{reason}; run `make gpu-test` on a machine with one"))


@pytest.fixture(scope="session")
def has_gpu() -> bool:
    return _no_gpu() is None


@pytest.fixture(scope="session")
def plugin_build() -> BuildResult:
    """The whole library, for TEST_ARCHITECTURES; a later run takes it as it is."""
    try:
        return build(TEST_ARCHITECTURES, TEST_BUILD_DIR, jobs=2)
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernel_library(plugin_build: BuildResult) -> Library:
    """The C interface of that build."""
    return load(plugin_build.kernels.path.parent)
