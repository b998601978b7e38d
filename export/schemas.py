"""ONNX schemas of the operators that the canonical graph uses and the onnx package does not define.

The exporter looks every operator's schema up, and so does the checker. Registering twice is an error in onnx, hence the guard.
"""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

CONTRIB_DOMAIN = "com.microsoft"
_ACTIVATIONS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def register_schemas() -> None:
    """Make com.microsoft::MoE known to the onnx package of this process. Safe to call again."""
    if not onnx.defs.has("MoE", CONTRIB_DOMAIN):
        onnx.defs.register_schema(_moe_schema())


def _moe_schema() -> OpSchema:
    parameter, attribute, kind = OpSchema.FormalParameter, OpSchema.Attribute, OpSchema.AttrType
    optional = OpSchema.FormalParameterOption.Optional
    return OpSchema(
        "MoE",
        CONTRIB_DOMAIN,
        1,
        doc="Routed experts, as ONNX Runtime defines the operator; the router logits may be of a wider type than the tokens.",
        inputs=[
            parameter("input", "T", "[tokens, hidden]"),
            parameter("router_probs", "R", "[tokens, experts], logits before softmax"),
            parameter("fc1_experts_weights", "T", "[experts, 2 * inner, hidden], gate and up rows interleaved"),
            parameter("fc1_experts_bias", "T", "unused", param_option=optional),
            parameter("fc2_experts_weights", "T", "[experts, hidden, inner]"),
            parameter("fc2_experts_bias", "T", "unused", param_option=optional),
        ],
        outputs=[parameter("output", "T", "[tokens, hidden]")],
        type_constraints=[("T", _ACTIVATIONS, "tokens and weights"), ("R", _ACTIVATIONS, "router logits")],
        attributes=[
            attribute("k", kind.INT, "experts per token", required=False),
            attribute("activation_type", kind.STRING, "", required=False),
            attribute("normalize_routing_weights", kind.INT, "", required=False),
            attribute("swiglu_fusion", kind.INT, "", required=False),
            attribute("activation_alpha", kind.FLOAT, "", required=False),
            attribute("activation_beta", kind.FLOAT, "", required=False),
            attribute("first_local_expert", kind.INT, "which expert fc1 and fc2 begin with; default 0", required=False),
        ],
    )
