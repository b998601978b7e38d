"""The ONNX Runtime target: `build` lowers and writes an engine, `load` opens one as a session.

Loading needs numpy and onnxruntime only; building also needs onnx and onnx_ir, imported when `build` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.onnxruntime.build import build
    from engines.onnxruntime.session import load

__all__ = ["build", "load"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from engines.onnxruntime.build import build

        return build
    if name == "load":
        from engines.onnxruntime.session import load

        return load
    raise AttributeError(name)
