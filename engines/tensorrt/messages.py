"""What TensorRT says while it works, kept to explain a failure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from engines.errors import ENVIRONMENT, EngineError

# Said about every engine of ours and about nothing that matters.
_EXPECTED = ("has Int64 binding", "not found in plugin node")
# TensorRT-RTX looks for a driver even when it builds ahead of time.
_NO_DRIVER = "CUDA driver version is insufficient"
# What a build says about the memory that its plan will take: once per optimization profile, in order, and once in all.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


def make_logger(trt: Any, verbose: bool = False) -> Any:
    """A TensorRT logger that collects errors and warnings in `.errors` and `.warnings`, and prints only when `verbose`. What a build
    says about memory is in `.activation_bytes`, by optimization profile, and `.weight_bytes`.
    """

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.activation_bytes: list[int] = []
            self.weight_bytes: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if any(part in message for part in _EXPECTED):
                return
            if severity <= trt.ILogger.ERROR:
                if _NO_DRIVER not in message:
                    self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif found := _ACTIVATIONS.search(message):
                self.activation_bytes.append(int(found[1]))
            elif found := _WEIGHTS.search(message):
                self.weight_bytes = int(found[1])
            if verbose and severity <= trt.ILogger.INFO:
                print(f"TensorRT: {message}")

    return Collector()


def started(make: Callable[[Any], Any], what: str, logger: Any) -> Any:
    """What TensorRT makes with `logger`: its builder or its runtime. EngineError (exit code 3) where it makes none, as without a driver."""
    try:
        return make(logger)
    except TypeError as error:  # how the Python module says that TensorRT gave nothing
        text = f"{failure(f'starting its {what}', logger)}; is there an NVIDIA driver that goes with this version?"
        raise EngineError(text, exit_code=ENVIRONMENT) from error


def failure(doing: str, logger: Any) -> EngineError:
    """An error that says what failed and TensorRT's first reason."""
    reason = logger.errors[0] if logger.errors else "TensorRT gave no reason"
    more = f" (and {len(logger.errors) - 1} more messages)" if len(logger.errors) > 1 else ""
    return EngineError(f"TensorRT failed {doing}: {reason}{more}")
