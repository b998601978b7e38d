"""Custom torch operators that survive tracing as single nodes, each with an eager reference and a fake implementation.

`export.translate` gives each one its ONNX form. Importing this package registers them under `torch.ops.mxcompile`.
"""

from model_defs.ops.kv_cache import append_to_cache
from model_defs.ops.lightning_attention import lightning_attention
from model_defs.ops.log_decay import log_decay
from model_defs.ops.moe import mix_experts, mixture_of_experts
from model_defs.ops.place_images import place_images
from model_defs.ops.residual import scaled_residual
from model_defs.ops.rms_norm import rms_norm
from model_defs.ops.rotary import rotary_angles, rotary_embedding
from model_defs.ops.softmax_attention import softmax_attention

__all__ = [
    "append_to_cache",
    "lightning_attention",
    "log_decay",
    "mix_experts",
    "mixture_of_experts",
    "place_images",
    "rms_norm",
    "rotary_angles",
    "rotary_embedding",
    "scaled_residual",
    "softmax_attention",
]
