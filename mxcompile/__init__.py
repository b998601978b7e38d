"""mxcompile: ahead-of-time compiler for hybrid lightning-attention mixture-of-experts models.

    import mxcompile
    mxcompile.build("checkpoint", "engine")
    engine = mxcompile.load("engine")
    print(engine.generate("Once upon a time", max_new_tokens=50).text)

The names below are imported when they are first used, so that `import mxcompile` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxcompile.building import build
    from mxcompile.checkpoints import create_checkpoint
    from mxcompile.exporting import export_onnx
    from mxcompile.inspection import inspect
    from mxcompile.loading import generate, load
    from mxcompile.validation import validate

__version__ = "0.1.0"

_HOMES = {
    "build": "mxcompile.building",
    "create_checkpoint": "mxcompile.checkpoints",
    "export_onnx": "mxcompile.exporting",
    "generate": "mxcompile.loading",
    "inspect": "mxcompile.inspection",
    "load": "mxcompile.loading",
    "validate": "mxcompile.validation",
}

__all__ = ["__version__", "build", "create_checkpoint", "export_onnx", "generate", "inspect", "load", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mxcompile' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
