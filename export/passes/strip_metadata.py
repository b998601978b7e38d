"""Pass: leave out what only the tracer knows."""

from __future__ import annotations

import onnx_ir as ir


class StripMetadata(ir.passes.InPlacePass):
    """Remove the tracer's notes.

    1. Nodes, values, the graph and the model lose all metadata and doc strings; they name source files of the machine that traced.
    2. Optional outputs that nobody reads and that end a node's list are removed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for holder in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.initializers.values()):
            _clean(holder)
        for node in model.graph:
            for output in node.outputs:
                _clean(output)
            kept = len(node.outputs)
            while kept > 1 and not node.outputs[kept - 1].uses() and not node.outputs[kept - 1].is_graph_output():
                kept -= 1
            node.resize_outputs(kept)
        return ir.passes.PassResult(model, modified=True)


def _clean(holder: ir.Model | ir.Graph | ir.Node | ir.Value) -> None:
    holder.metadata_props.clear()
    holder.doc_string = None
