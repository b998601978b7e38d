"""Finds what the plugin build needs: nvcc, CMake, TensorRT and CUTLASS headers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from plugins.errors import ToolchainError

# Verified to load in TensorRT-RTX 1.7 (plugins built with the 10.14 headers of kernel-lens 2.0).
_TENSORRT_SYSTEM_DIRS = ("/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/tensorrt/include")


@dataclass(frozen=True)
class Toolchain:
    """Paths and versions; None where an optional part is missing."""

    nvcc: Path
    nvcc_version: str
    cmake: Path
    ninja: Path | None
    tensorrt_include: Path | None
    tensorrt_version: str | None
    cutlass_include: Path | None


def _package_dirs(package: str) -> list[Path]:
    """Folders of an installed Python package, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _which(tool: str) -> str | None:
    """On the PATH, or beside the running Python: where a virtual environment that is not activated has its programs."""
    beside = Path(sys.executable).parent / tool
    return shutil.which(tool) or (str(beside) if os.access(beside, os.X_OK) else None)


def find_nvcc() -> Path:
    """$CUDACXX, nvcc on the PATH or in /usr/local/cuda, else that of the PyPI wheels."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates += [str(folder / "cu13" / "bin" / "nvcc") for folder in _package_dirs("nvidia")]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            return Path(candidate)
    raise ToolchainError(
        "no nvcc found ($CUDACXX, PATH, /usr/local/cuda, Python packages); install CUDA 13 or `pip install mxcompile[plugins]`"
    )


def nvcc_version(nvcc: Path) -> str:
    """'13.0.88'; raises ToolchainError where it does not run or is older than CUDA 12.8 (the first with sm_120)."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"{nvcc} does not run: {error}") from error
    match = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", done.stdout)
    if not match:
        raise ToolchainError(f"{nvcc} --version says nothing known: {done.stdout.strip()[:200]}")
    if (int(match[1]), int(match[2])) < (12, 8):
        raise ToolchainError(f"{nvcc} is CUDA {match[1]}.{match[2]}; 12.8 or later is needed")
    return ".".join(match.groups())


def find_tensorrt_headers() -> tuple[Path, str] | None:
    """Folder of NvInfer.h and its version, from $TENSORRT_INCLUDE_DIR, the package kernel-lens, or the system."""
    wanted = os.environ.get("TENSORRT_INCLUDE_DIR")
    if wanted and not (Path(wanted) / "NvInferVersion.h").is_file():
        raise ToolchainError(f"TENSORRT_INCLUDE_DIR={wanted} holds no NvInferVersion.h")
    candidates = [Path(wanted)] if wanted else []
    candidates += [folder / "include" / "tensorrt" for folder in _package_dirs("kernel_lens")]
    candidates += [Path(folder) for folder in _TENSORRT_SYSTEM_DIRS]
    for folder in candidates:
        header = folder / "NvInferVersion.h"
        if header.is_file():
            return folder, _tensorrt_version(header)
    return None


def _tensorrt_version(header: Path) -> str:
    """'10.14' from NvInferVersion.h, which names the number directly or through a second macro."""
    macros: dict[str, str] = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", header.read_text(errors="replace")))

    def number(name: str) -> str:
        value = macros.get(name, "")
        return macros.get(value, value)

    major, minor = number("NV_TENSORRT_MAJOR"), number("NV_TENSORRT_MINOR")
    if not (major.isdigit() and minor.isdigit()):
        raise ToolchainError(f"{header} does not say which TensorRT it is of")
    return f"{major}.{minor}"


def find_cutlass() -> Path | None:
    """Folder of cutlass/cutlass.h, from $CUTLASS_INCLUDE_DIR or the package nvidia-cutlass."""
    candidates = [Path(os.environ["CUTLASS_INCLUDE_DIR"])] if os.environ.get("CUTLASS_INCLUDE_DIR") else []
    candidates += [folder / "source" / "include" for folder in _package_dirs("cutlass_library")]
    return next((folder for folder in candidates if (folder / "cutlass" / "cutlass.h").is_file()), None)


def find_toolchain() -> Toolchain:
    """Everything, or a ToolchainError that says what is missing."""
    cmake = _which("cmake")
    if cmake is None:
        raise ToolchainError("no cmake found; install CMake 3.22 or later (`pip install cmake`)")
    ninja = _which("ninja")
    nvcc = find_nvcc()
    headers = find_tensorrt_headers()
    return Toolchain(
        nvcc=nvcc,
        nvcc_version=nvcc_version(nvcc),
        cmake=Path(cmake),
        ninja=Path(ninja) if ninja else None,
        tensorrt_include=headers[0] if headers else None,
        tensorrt_version=headers[1] if headers else None,
        cutlass_include=find_cutlass(),
    )
