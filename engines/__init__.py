"""Engines: what a build leaves on disk, and the sessions that run it. Loading needs neither torch nor onnx."""

from __future__ import annotations

import os
from typing import Any

from engines.directory import read_config
from engines.errors import EngineError
from engines.interface import Session

__all__ = ["EngineError", "Session", "load"]

# ONNX Runtime's packages (from 1.29 on) otherwise tell their maker over the network which graphs are run, and keep an identifier of
# the machine. It reads this while it is imported; a value that the user has set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def load(path: str | os.PathLike[str], **options: Any) -> Session:
    """Open an engine directory with the runtime it was built for; `options` are that runtime's own.

    Raises EngineError when it is not an engine, is damaged, or its runtime is not installed (exit code 3).
    """
    config = read_config(path)
    if config.target == "onnxruntime" and config.mapping.ranks > 1:
        from engines.parallel.session import load as load_parallel

        return load_parallel(path, **options)
    if config.target == "onnxruntime":
        from engines.onnxruntime.session import load as load_onnxruntime

        return load_onnxruntime(path, **options)
    if config.target in ("tensorrt", "tensorrt-rtx"):
        from engines.tensorrt.runtime import load as load_tensorrt

        return load_tensorrt(path, **options)
    raise EngineError(f"{path}: built for target {config.target!r}, which this mxcompile cannot run")
