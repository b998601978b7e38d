"""Shared by the plugin tests: one build of the library for a single architecture, and the GPU marker."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from plugins import catalog
from plugins.build import BuildResult, build
from plugins.errors import ToolchainError
from plugins.library import Library, load

TEST_BUILD_DIR = Path(__file__).parents[2] / "build" / "plugins-test"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def _compute_capability() -> int | str:
    """10 * major + minor of the first GPU, or why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return "no NVIDIA GPU"
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return 10 * major.value + minor.value


def wanted_architectures() -> tuple[str, ...]:
    """That of the GPU at hand; without one the cheapest to compile (`python -m plugins.build` compiles all of them)."""
    if chosen := os.environ.get("MXCOMPILE_TEST_ARCHS"):
        return tuple(chosen.split(","))
    capability = _compute_capability()
    return (catalog.architecture_for(capability) or "80",) if isinstance(capability, int) else ("80",)


def _no_gpu() -> str | None:
    """Why GPU tests cannot run, or None where there is a GPU."""
    capability = _compute_capability()
    return capability if isinstance(capability, str) else None


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
    """The whole library, for one architecture; a later run takes it as it is."""
    try:
        return build(wanted_architectures(), TEST_BUILD_DIR)
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernel_library(request: pytest.FixtureRequest) -> Library:
    """The C interface of that build, or of the library in $MXCOMPILE_TEST_LIBRARY (what benchmarks/gpu/run.py gives)."""
    if given := os.environ.get("MXCOMPILE_TEST_LIBRARY"):
        return load(Path(given))
    return load(request.getfixturevalue("plugin_build").kernels.path.parent)
