"""Builds the CUDA plugin library with CMake: `build()` for programs, `python -m plugins.build` for hands.

The result is kept beside the libraries (`build.json`) under a digest of sources, options and tools: an unchanged tree is not
built again. Kernels that spill registers or whose wgmma ptxas serialised fail the build (plugins/ptxas.py).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from plugins import catalog
from plugins.errors import BuildError, PluginsError, PluginsUsageError, ToolchainError
from plugins.ptxas import KernelUsage
from plugins.toolchain import Toolchain, find_toolchain

SOURCE_DIR = Path(__file__).resolve().parent
KERNELS_LIBRARY = "libmxcompile_kernels.so"
TENSORRT_LIBRARY = "libmxcompile_trt.so"
MANIFEST = "build.json"
_SOURCE_SUFFIXES = {".cpp", ".cu", ".h", ".cuh"}
_SOURCE_NAMES = {"CMakeLists.txt", "ptxas.py"}


@dataclass(frozen=True)
class BuiltLibrary:
    """One shared library: absolute path and bytes."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class BuildResult:
    """What a build left. `tensorrt` is None where there were no TensorRT headers; `skipped` where nothing had changed.

    `sources` is the part of `digest` that does not depend on the machine: a library carried to another one is checked by it.
    """

    kernels: BuiltLibrary
    tensorrt: BuiltLibrary | None
    architectures: tuple[str, ...]
    digest: str
    sources: str
    nvcc_version: str
    tensorrt_headers: str | None
    seconds: float
    skipped: bool
    usage: tuple[KernelUsage, ...] = field(repr=False)

    @property
    def libraries(self) -> tuple[BuiltLibrary, ...]:
        """All libraries that were built."""
        return (self.kernels,) if self.tensorrt is None else (self.kernels, self.tensorrt)


def default_build_dir() -> Path:
    """$MXCOMPILE_PLUGINS_DIR, else build/plugins of a source checkout, else the user's cache."""
    if chosen := os.environ.get("MXCOMPILE_PLUGINS_DIR"):
        return Path(chosen)
    if (SOURCE_DIR.parent / "pyproject.toml").is_file():
        return SOURCE_DIR.parent / "build" / "plugins"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mxcompile" / "plugins"


def check_architectures(archs: Sequence[str]) -> tuple[str, ...]:
    """The architectures in the catalog's order, without doubles; PluginsUsageError names an unknown one."""
    unknown = [arch for arch in archs if arch not in catalog.ARCHITECTURES]
    if unknown or not archs:
        known = ", ".join(catalog.ARCHITECTURES)
        raise PluginsUsageError(f"unknown architecture {', '.join(unknown) or '(none given)'}; choose from {known}")
    return tuple(arch for arch in catalog.ARCHITECTURES if arch in archs)


def source_files() -> list[Path]:
    """Everything that goes into the libraries, sorted."""
    return sorted(p for p in SOURCE_DIR.rglob("*") if p.suffix in _SOURCE_SUFFIXES or p.name in _SOURCE_NAMES)


def source_digest(tools: Toolchain, archs: Sequence[str], tensorrt: bool) -> str:
    """SHA-256 over the sources, architectures and tools: equal only where a build would give the same again."""
    tensorrt_part = (str(tools.tensorrt_include), tools.tensorrt_version) if tensorrt else None
    options = [str(tools.nvcc), tools.nvcc_version, tensorrt_part, str(tools.cutlass_include), sources_digest(archs)]
    return hashlib.sha256(json.dumps(options).encode()).hexdigest()


def sources_digest(archs: Sequence[str]) -> str:
    """SHA-256 over source names and contents and architectures: the same on every machine."""
    sha = hashlib.sha256(json.dumps(list(archs)).encode())
    for path in source_files():
        content = path.read_bytes()
        sha.update(f"\0{path.relative_to(SOURCE_DIR)}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def build(
    archs: Sequence[str] = catalog.ARCHITECTURES,
    build_dir: Path | None = None,
    *,
    jobs: int | None = None,
    tensorrt: bool | None = None,
    force: bool = False,
    verbose: bool = False,
) -> BuildResult:
    """Builds the kernel library and, where TensorRT headers are found, the TensorRT plugin library.

    `archs`: names of catalog.ARCHITECTURES. `jobs`: compilers at a time (default: one per core). `tensorrt`: True insists
    on the TensorRT library, False leaves it out, None builds it where there are headers. `force` builds even if nothing
    changed. `verbose` passes the compiler's output on. Raises PluginsUsageError, ToolchainError, BuildError.
    """
    archs = check_architectures(archs)
    if jobs is not None and jobs < 1:
        raise PluginsUsageError(f"jobs is {jobs}; it must be at least 1")
    folder = (build_dir or default_build_dir()).absolute()
    tools = find_toolchain()
    if tensorrt and tools.tensorrt_include is None:
        raise ToolchainError("no TensorRT headers found; set TENSORRT_INCLUDE_DIR or `pip install kernel-lens`")
    with_tensorrt = tools.tensorrt_include is not None if tensorrt is None else tensorrt
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginsError(f"cannot create {folder}: {error.strerror}") from error
    with _locked(folder):
        digest = source_digest(tools, archs, with_tensorrt)
        if not force and (known := load_result(folder)) and known.digest == digest:
            return known
        (folder / MANIFEST).unlink(missing_ok=True)
        started = time.monotonic()
        _run_cmake(folder, tools, archs, with_tensorrt, jobs or os.cpu_count() or 1, verbose)
        result = BuildResult(
            kernels=_library(folder / KERNELS_LIBRARY),
            tensorrt=_library(folder / TENSORRT_LIBRARY) if with_tensorrt else None,
            architectures=archs,
            digest=digest,
            sources=sources_digest(archs),
            nvcc_version=tools.nvcc_version,
            tensorrt_headers=tools.tensorrt_version if with_tensorrt else None,
            seconds=time.monotonic() - started,
            skipped=False,
            usage=tuple(_read_usage(folder)),
        )
        _store_result(folder, result)
        return result


def load_result(folder: Path) -> BuildResult | None:
    """The last good build in `folder`, or None where there is none or its libraries are not what was built."""
    try:
        data = json.loads((folder / MANIFEST).read_text())
        libraries = {name: BuiltLibrary(folder / name, size) for name, size in data.pop("libraries").items()}
        if any(library.path.stat().st_size != library.bytes for library in libraries.values()):
            return None
        usage = tuple(KernelUsage(**kernel) for kernel in data.pop("usage"))
        data["architectures"] = tuple(data["architectures"])
        kernels, tensorrt = libraries[KERNELS_LIBRARY], libraries.get(TENSORRT_LIBRARY)
        return BuildResult(kernels=kernels, tensorrt=tensorrt, usage=usage, skipped=True, **data)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store_result(folder: Path, result: BuildResult) -> None:
    data = asdict(result)
    for name in ("kernels", "tensorrt", "skipped"):
        data.pop(name)
    data["libraries"] = {library.path.name: library.bytes for library in result.libraries}
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(folder / MANIFEST)


def _library(path: Path) -> BuiltLibrary:
    if not path.is_file():
        raise BuildError(f"the build left no {path.name}")
    return BuiltLibrary(path, path.stat().st_size)


def _read_usage(folder: Path) -> Iterator[KernelUsage]:
    """What the launcher (plugins/ptxas.py) left beside the objects, without those whose source is gone."""
    for objects in sorted((folder / "CMakeFiles").glob("*.dir")):
        for report in sorted(objects.rglob("*.o.ptxas.json")):
            source = SOURCE_DIR / str(report.relative_to(objects)).removesuffix(".o.ptxas.json")
            if source.is_file():
                yield from (KernelUsage(**kernel) for kernel in json.loads(report.read_text()))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder, also among processes."""
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run_cmake(folder: Path, tools: Toolchain, archs: Sequence[str], tensorrt: bool, jobs: int, verbose: bool) -> None:
    configure = [
        str(tools.cmake),
        *("-S", str(SOURCE_DIR), "-B", str(folder)),
        *("-G", "Ninja" if tools.ninja else "Unix Makefiles"),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={tools.nvcc}",
        f"-DMXC_ARCHS={';'.join(archs)}",
        f"-DMXC_NVCC_LAUNCHER={sys.executable};{SOURCE_DIR / 'ptxas.py'}",
        f"-DTENSORRT_INCLUDE_DIR={tools.tensorrt_include if tensorrt else ''}",
        f"-DCUTLASS_INCLUDE_DIR={tools.cutlass_include or ''}",
    ]
    log = _run(configure, verbose)
    if log is not None:
        # A folder configured with another compiler or generator cannot be reused.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        log = _run(configure, verbose)
    if log is not None:
        raise BuildError(f"CMake could not configure the build:\n{_excerpt(log)}", log)
    log = _run([str(tools.cmake), "--build", str(folder), "--parallel", str(jobs)], verbose)
    if log is not None:
        raise BuildError(f"the plugin library does not build:\n{_excerpt(log)}", log)


def _run(command: list[str], verbose: bool) -> str | None:
    """Runs a command; None where it was good, else its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if verbose:
        print(done.stdout, end="", file=sys.stderr)
    return done.stdout if done.returncode else None


def _excerpt(log: str) -> str:
    """The lines of a build log that say what is wrong, at most 20 and without the commands."""
    wrong = re.compile(r"\berror\b|undefined reference|\bfatal\b", re.IGNORECASE)
    lines = [line for line in log.splitlines() if wrong.search(line) and " -o " not in line]
    return "\n".join((lines or log.splitlines())[:20])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m plugins.build [--arch 90a,120] [--build-dir DIR] [--jobs N] [--no-tensorrt] [--force] [--verbose]`."""
    parser = argparse.ArgumentParser(prog="python -m plugins.build", description="Builds the CUDA plugin library.")
    parser.add_argument("--arch", default=",".join(catalog.ARCHITECTURES), help="comma-separated (%(default)s)")
    parser.add_argument("--build-dir", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--no-tensorrt", action="store_true", help="kernels and C interface only")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(argv)
    try:
        result = build(
            options.arch.split(","),
            options.build_dir,
            jobs=options.jobs,
            tensorrt=False if options.no_tensorrt else None,
            force=options.force,
            verbose=options.verbose,
        )
    except PluginsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for library in result.libraries:
        print(f"{library.path}  {library.bytes} bytes")
    state = "unchanged" if result.skipped else f"built in {result.seconds:.0f} s"
    print(f"{', '.join(result.architectures)}: {len(result.usage)} kernels, {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
