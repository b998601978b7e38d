"""Pass: call dynamic dimensions by the contract's names."""

from __future__ import annotations

import re

import onnx_ir as ir


class NameDimensions(ir.passes.InPlacePass):
    """Replace the tracer's symbols (s16, s19, ...) by names.

    1. The symbol of each graph input's dimension takes the name that `names` gives for that input and axis.
    2. Every shape in the graph that uses the symbol, alone or in an expression, uses the name instead.
    3. Nothing but shapes changes.
    """

    def __init__(self, names: dict[str, tuple[int | str, ...]]) -> None:
        super().__init__()
        self._names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        renamed: dict[str, str] = {}
        for value in model.graph.inputs:
            for dim, name in zip(value.shape or (), self._names[value.name or ""], strict=True):
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value != name:
                    renamed[str(dim.value)] = str(name)
        if not renamed:
            return ir.passes.PassResult(model, modified=False)
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b")
        for value in _all_values(model.graph):
            if value.shape is not None:
                value.shape = ir.Shape([_rename(dim, pattern, renamed) for dim in value.shape])
        return ir.passes.PassResult(model, modified=True)


def _rename(dim: int | ir.SymbolicDim, pattern: re.Pattern[str], renamed: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    return pattern.sub(lambda match: renamed[match.group()], str(dim.value))


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]
