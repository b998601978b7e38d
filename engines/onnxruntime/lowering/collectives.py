"""`DistCollective` of the default domain -> `mxcompile::DistCollective`.

ONNX Runtime has no such operator: an engine of several ranks is cut into pieces at these nodes (`engines.parallel`), and the
exchange happens between two pieces. The domain of our own keeps the whole graph valid ONNX.

Rules:
1. Only the domain changes.
2. Operations other than all_reduce with sum, and all_gather, are refused: nothing would execute them.
"""

from __future__ import annotations

import onnx_ir as ir

DOMAIN = "mxcompile"
OPERATOR = "DistCollective"
KNOWN = {("all_reduce", "sum"), ("all_gather", "none")}


class LowerCollectives(ir.passes.InPlacePass):
    """Collectives as nodes of our own domain (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != OPERATOR or node.domain != "":
                continue
            form = tuple(node.attributes[key].as_string() for key in ("collective_operation", "reduce_op"))
            if form not in KNOWN:
                raise ValueError(f"{node.name}: the collective {' '.join(form)} has no implementation on CPU")
            node.domain = DOMAIN
            model.graph.opset_imports[DOMAIN] = 1
            modified = True
        return ir.passes.PassResult(model, modified)
