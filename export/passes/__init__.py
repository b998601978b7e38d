"""Graph passes, one per file, each an onnx_ir pass whose docstring numbers the rules it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir


def run_passes(model: ir.Model, passes: Sequence[ir.passes.PassBase], check: Callable[[ir.Model], None]) -> ir.Model:
    """Apply the passes in order, calling `check` after each; `check` raises when the graph is no longer sound."""
    for graph_pass in passes:
        model = graph_pass(model).model
        check(model)
    return model
