"""What this machine has, and which targets it can build and run. Nothing is imported that a version number can tell."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What building and running each target needs: distribution names of the package registry.
_BUILD = ("torch", "onnx", "onnx-ir", "onnxscript", "safetensors")
_LIBRARIES = (
    "numpy",
    "ml_dtypes",
    "tokenizers",
    "pillow",
    "llguidance",
    "onnxruntime",
    *_BUILD,
    "transformers",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
)
_ONNXRUNTIME_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_TENSORRT_RTX_DISTRIBUTIONS = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt_rtx", "tensorrt-rtx")
_TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_LIMIT_S = 10  # for each question to a tool; a wedged GPU driver must not hang the report


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver tells."""

    name: str
    compute_capability: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class TargetStatus:
    """Whether this machine can build and run engines of a target; the lists name what is missing."""

    target: str
    build_missing: list[str]
    run_missing: list[str]

    @property
    def can_build(self) -> bool:
        return not self.build_missing

    @property
    def can_run(self) -> bool:
        return not self.run_missing


@dataclass(frozen=True)
class Machine:
    """Everything that `mxcompile doctor` shows. Sizes in bytes; absent things are None or empty."""

    mxcompile: str
    python: str
    system: str
    cpu: str
    cores: int
    memory_total: int | None
    memory_available: int | None
    disk_free: int
    libraries: dict[str, str | None]
    providers: list[str]
    compiler: str | None
    nvcc: str | None
    gpus: list[Gpu]
    targets: list[TargetStatus] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        for status, target in zip(values["targets"], self.targets, strict=True):
            status |= {"can_build": target.can_build, "can_run": target.can_run}
        return values


def examine(folder: str | Path = ".") -> Machine:
    """Look at this machine; `folder` is where free disk space is measured."""
    from mxcompile import __version__

    libraries = {name: _version(name) for name in _LIBRARIES}
    libraries["onnxruntime"] = _first_version(_ONNXRUNTIME_DISTRIBUTIONS)
    libraries["tensorrt"] = _first_version(_TENSORRT_DISTRIBUTIONS)
    libraries["tensorrt_rtx"] = _first_version(_TENSORRT_RTX_DISTRIBUTIONS)
    memory = _memory()
    machine = Machine(
        mxcompile=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_total=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        disk_free=shutil.disk_usage(folder).free,
        libraries=libraries,
        providers=_providers(),
        compiler=next((line for name in ("c++", "g++", "clang++") if (line := _first_line(name, "--version"))), None),
        nvcc=_nvcc(),
        gpus=_gpus(),
    )
    return dataclasses.replace(machine, targets=_targets(machine))


def _targets(machine: Machine) -> list[TargetStatus]:
    from mxcompile.building import TARGET_DTYPES

    build = [name for name in _BUILD if machine.libraries[name] is None]
    capabilities = [tuple(int(part) for part in gpu.compute_capability.split(".")) for gpu in machine.gpus]

    def library(name: str) -> list[str]:
        return [] if machine.libraries[name] else [name]

    hopper = [] if (9, 0) in capabilities else ["a Hopper GPU (H20, H100, H200)"]
    ampere = [] if any(capability >= (8, 0) for capability in capabilities) else ["an NVIDIA GPU, Ampere or later"]
    compiler = [] if machine.nvcc else ["nvcc"]

    def supported(target: str) -> list[str]:
        return [] if target in TARGET_DTYPES else ["a version of mxcompile with this target"]

    rtx, full, cuda = library("tensorrt_rtx"), library("tensorrt"), library("cuda-bindings")
    return [
        TargetStatus("onnxruntime", build + library("onnxruntime"), library("onnxruntime")),
        TargetStatus(
            "tensorrt-rtx",
            supported("tensorrt-rtx") + build + rtx + compiler,
            supported("tensorrt-rtx") + rtx + cuda + ampere,
        ),
        TargetStatus(
            "tensorrt",
            supported("tensorrt") + build + full + compiler + hopper,
            supported("tensorrt") + full + cuda + hopper,
        ),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_version(distributions: tuple[str, ...]) -> str | None:
    return next((version for name in distributions if (version := _version(name))), None)


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import engines  # noqa: F401  before onnxruntime, which it keeps from reporting home

    try:
        import onnxruntime
    except Exception as error:  # a broken installation is a finding, not a failure of the report
        return [f"onnxruntime cannot be imported: {error}"]
    return list(onnxruntime.get_available_providers())


def _first_line(*command: str, pattern: str = ".+") -> str | None:
    """First line of a tool's output that matches, or None when there is no such tool or it fails."""
    output = _output(*command)
    return next((line.strip() for line in output.splitlines() if re.search(pattern, line)), None)


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _nvcc() -> str | None:
    """The system's compiler, or the one that the `plugins` extra installs."""
    found = _first_line("nvcc", "--version", pattern="release")
    version = _version("nvidia-cuda-nvcc")
    return found or (f"nvidia-cuda-nvcc {version} (Python package)" if version else None)


def _gpus() -> list[Gpu]:
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    gpus = []
    for line in _output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) == 4 and re.fullmatch(r"\d+\.\d+", fields[1]) and fields[2].isdigit():
            gpus.append(Gpu(fields[0], fields[1], int(fields[2]), fields[3]))
    return gpus


def available_memory() -> int | None:
    """Bytes that processes may still take, on this machine and in this container; None where nobody says."""
    available = _memory().get("MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        left = limit - used + (int(cached[1]) if cached else 0)
        available = left if available is None else min(available, left)
    return available


def _memory() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    found = (re.match(r"(\w+):\s+(\d+) kB", line) for line in lines)
    return {match[1]: int(match[2]) * 1024 for match in found if match}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
