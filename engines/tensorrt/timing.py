"""TensorRT's timing cache: what it measured of its kernels on this GPU, kept for the next build.

TensorRT proper chooses kernels by running them, which takes most of a build. TensorRT-RTX builds without a GPU and measures
nothing, so it has no use for the cache.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.tensorrt.gpus import Gpu


@dataclass(frozen=True)
class TimingCache:
    """The cache file of one TensorRT version and GPU; `file` is None where none is used."""

    file: Path | None

    @classmethod
    def of(cls, trt: Any, config: Any, target: str, gpu: Gpu) -> TimingCache:
        """Give the builder what earlier builds measured. A file that TensorRT does not take is ignored."""
        if target != "tensorrt":
            return cls(None)
        file = cache_folder() / f"timing-{trt.__version__}-{gpu.name}.bin"
        known = b""
        with contextlib.suppress(OSError):
            known = file.read_bytes()
        for content in (known, b""):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return cls(file)
        return cls(None)

    def keep(self, config: Any) -> None:
        """Store what this build measured; a disk that refuses costs only the next build's time."""
        cache = config.get_timing_cache() if self.file is not None else None
        if self.file is None or cache is None:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.file.parent, delete=False) as made:
                made.write(memoryview(cache.serialize()))
            os.replace(made.name, self.file)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/mxcompile, else ~/.cache/mxcompile."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mxcompile"
