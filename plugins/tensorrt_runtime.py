"""TensorRT with this package's plugins: finds the Python module, makes its parser able to meet plugins, registers ours.

    trt = load_tensorrt("tensorrt-rtx")
    load_plugins(trt)                 # before an ONNX file is parsed and before an engine is read

TensorRT-RTX's ONNX parser opens `libtensorrt_rtx.so` by that bare name when it meets a plugin, the wheel ships only
`libtensorrt_rtx.so.1`, and a failure there ends the process (seen with 1.7.1). The parser looks beside itself (its RPATH is
$ORIGIN), so both libraries are loaded here through links in a temporary folder that also holds the missing name.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import importlib.util
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from plugins import catalog
from plugins.build import TENSORRT_LIBRARY
from plugins.errors import LibraryError, PluginsUsageError
from plugins.library import library_path

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# Of TensorRT the newest that takes plugins compiled with the headers that the package kernel-lens holds (10.14).
_WHEELS = {"tensorrt-rtx": "tensorrt-rtx-cu13", "tensorrt": "'tensorrt-cu13>=10.16,<11'"}

# Loaded as one through the links; the parser after what it needs.
_RTX_LIBRARIES = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")


class LoadedPlugins(NamedTuple):
    """The registered library: its path and the TensorRT headers ('10.14') it was compiled with."""

    path: Path
    headers: str
    handle: ctypes.CDLL

    def alias_states(self, trt: ModuleType, config: Any, on: bool = True) -> None:
        """Lets engines built with `config` from now on keep the present state where the past one is.

        The engine's past and present state must then be bound to the same address. Not needed for working in place: without
        it the kernels write where the present state is bound, which may be the past state's address as well.
        """
        feature = trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03
        config.set_preview_feature(feature, on)
        self.handle.mxc_tensorrt_state_aliasing(int(on))


def load_tensorrt(flavour: str = "tensorrt-rtx") -> ModuleType:
    """The Python module `tensorrt_rtx` or `tensorrt`. LibraryError where it is not installed or does not load."""
    if flavour not in MODULES:
        raise PluginsUsageError(f"unknown TensorRT flavour {flavour!r}; give one of {', '.join(MODULES)}")
    name = MODULES[flavour]
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        raise LibraryError(f"Python module {name} is not installed; run `pip install {_WHEELS[flavour]}`")
    if flavour == "tensorrt-rtx":
        _link_rtx_libraries()
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise LibraryError(f"Python module {name} does not load: {error}") from error


@functools.cache
def _link_rtx_libraries() -> None:
    """Loads the wheel's libraries from a folder where the parser finds the name it looks for."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        return  # not from wheels: the system's loader knows the names
    origin = Path(next(iter(spec.submodule_search_locations)))
    if (origin / _RTX_LIBRARIES[0]).exists():
        return  # someone gave the wheel the missing name
    if "tensorrt_rtx_libs" in sys.modules:
        raise LibraryError("tensorrt_rtx was imported before load_tensorrt(); import it through load_tensorrt() only")
    folder = Path(tempfile.mkdtemp(prefix="mxcompile-tensorrt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in _RTX_LIBRARIES:
        for library in sorted(origin.glob(name + ".[0-9]*")):
            (folder / library.name).symlink_to(library)
            if not (folder / name).exists():
                (folder / name).symlink_to(library)
    for library in (folder / name for name in _RTX_LIBRARIES if (folder / name).exists()):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise LibraryError(f"{library.name} does not load: {error}") from error


def flavour_of(trt: ModuleType) -> str:
    """'tensorrt-rtx' or 'tensorrt', by the module's name."""
    return next((flavour for flavour, name in MODULES.items() if trt.__name__ == name), "tensorrt")


def check_versions(flavour: str, runtime: str, headers: str) -> None:
    """LibraryError where a plugin library compiled with TensorRT `headers` must not be loaded into version `runtime`.

    TensorRT keeps its plugin interface within a major version. TensorRT-RTX (1.7 or later) takes plugins compiled with the
    headers of TensorRT 10 (10.14 was tried with 1.7.1) or 11, or with its own, which are versioned 1.x.
    """
    header, run = _version(headers), _version(runtime)
    fits = (1, 7) <= run < (2, 0) and header[0] in (1, 10, 11) if flavour == "tensorrt-rtx" else header[0] == run[0]
    if not fits:
        raise LibraryError(
            f"the plugin library was compiled with TensorRT {headers} headers and cannot be loaded into {flavour} {runtime}; "
            "set TENSORRT_INCLUDE_DIR to headers that go with it (for TensorRT: the folder include of NVIDIA's "
            "TensorRT repository, of the same major version) and run `mxcompile plugins build` again"
        )


def _version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise LibraryError(f"{text!r} is not a TensorRT version")
    return int(match[1]), int(match[2])


def load_plugins(trt: ModuleType, folder: Path | None = None) -> LoadedPlugins:
    """Registers libmxcompile_trt.so (of `folder`, default: where `build` puts it) with `trt`; again is harmless.

    LibraryError where it is missing, of other TensorRT headers, or where TensorRT does not take it.
    """
    path = library_path(folder, TENSORRT_LIBRARY)
    try:
        handle = ctypes.CDLL(str(path))
        number = int(handle.mxc_tensorrt_headers())
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} is not a plugin library of this package: {error}") from error
    headers = f"{number // 100}.{number % 100}"
    check_versions(flavour_of(trt), trt.__version__, headers)
    registry = trt.get_plugin_registry()
    wanted = set(catalog.plugin_names())
    if not wanted <= set(_registered(registry)):
        if registry.load_library(str(path)) is None:
            raise LibraryError(f"TensorRT {trt.__version__} did not load {path}")
        if missing := wanted - set(_registered(registry)):
            raise LibraryError(
                f"{path} did not register {', '.join(sorted(missing))}; run `mxcompile plugins build` again"
            )
    return LoadedPlugins(path, headers, handle)


def _registered(registry: Any) -> Iterator[str]:
    """Names of version "1" in the empty namespace, as the ONNX parser looks them up."""
    for creator in registry.all_creators:
        if creator.plugin_version == "1" and creator.plugin_namespace == "":
            yield str(creator.name)
