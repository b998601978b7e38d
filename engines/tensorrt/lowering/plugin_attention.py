"""Attention as the plugin SoftmaxAttention, which reads the cache up to each row's length only: for large capacities.

Rules:
1. `Attention(q, K, V, nonpad_kv_seqlen=past + T)` with is_causal=1 becomes `mxcompile::SoftmaxAttention(q, K, V, past_lengths,
   new_lengths)`; an attribute `scale` is kept (absent: 1/sqrt(channels of a head), in both).
2. Rows past the new length come out as zeros instead of what padding would give; nothing reads them.
3. Attributes that the plugin lacks must have their neutral values (softcap 0, no windows, no fourth output).
"""

from __future__ import annotations

import onnx_ir as ir

from engines.rewrite import put_in_place_of
from engines.tensorrt.lowering.canonical_attention import cached_attentions, graph_input

DOMAIN = "mxcompile"
_NEUTRAL = {"softcap": 0.0, "left_window_size": -1, "right_window_size": -1, "qk_matmul_output_mode": 0, "is_causal": 1}


class PluginAttention(ir.passes.InPlacePass):
    """Give attention its lengths through the plugin (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for found in cached_attentions(model.graph):
            node = found.node
            for name, attribute in node.attributes.items():
                if name != "scale" and (name not in _NEUTRAL or attribute.value != _NEUTRAL[name]):
                    raise ValueError(f"{node.name}: SoftmaxAttention has no {name}={attribute.value}")
            lengths = [graph_input(model.graph, name) for name in ("past_lengths", "new_lengths")]
            scale = node.attributes.get("scale")
            attributes = {} if scale is None else {"scale": scale.as_float()}
            made = ir.node(
                "SoftmaxAttention", [found.query, found.key, found.value, *lengths], attributes, domain=DOMAIN
            )
            made.name = node.name
            put_in_place_of(node, made, [(node.outputs[0], made.outputs[0])])
            model.graph.remove(node, safe=True)
            modified = True
        if modified:
            model.opset_imports.setdefault(DOMAIN, 1)
        return ir.passes.PassResult(model, modified)
