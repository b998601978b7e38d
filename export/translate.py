"""The ONNX form of each custom torch operator: one standard (or com.microsoft) node, as the design's table of pieces says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import values

from export.contract import CANONICAL_OPSET
from export.schemas import CONTRIB_DOMAIN, register_schemas
from model_defs.config import ModelConfig


def vision_translation_table() -> dict[Callable, Callable]:
    """As `translation_table`, for the vision half: shorter forms of what torch's own translations spell out."""
    op, base = values.Opset("", CANONICAL_OPSET), values.Opset("", 18)

    def gelu(x: Any, approximate: str = "none") -> Any:
        return op.Gelu(x, approximate=approximate)

    def conv2d(x: Any, weight: Any, bias: Any = None, stride: Sequence[int] = (1, 1)) -> Any:
        return base.Conv(x, weight, bias, strides=list(stride))

    def cut(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
        first, last = start or 0, np.iinfo(np.int64).max if end is None else end
        if first == 0 and last == np.iinfo(np.int64).max:
            return base.Identity(x)
        return base.Slice(x, *(base.Constant(value_ints=[number]) for number in (first, last, dim, step)))

    return {
        torch.ops.aten.conv2d.default: conv2d,
        torch.ops.aten.gelu.default: gelu,
        torch.ops.aten.slice.Tensor: cut,
    }


def translation_table(config: ModelConfig) -> dict[Callable, Callable]:
    """torch operator -> function that builds its ONNX nodes, for `torch.onnx.export(custom_translation_table=...)`."""
    register_schemas()
    op = values.Opset("", CANONICAL_OPSET)
    base = values.Opset("", 18)  # the operators whose later forms only add attributes with defaults
    contrib = values.Opset(CONTRIB_DOMAIN, 1)

    def rms_norm(x: Any, weight: Any, eps: float) -> Any:
        # stash_type 1 (fp32): the normalised value is rounded to x's type before the weight multiplies it, as in the original.
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)

    def log_decay(valid: Any, slopes: Sequence[float]) -> Any:
        return base.Mul(valid, base.Constant(value=ir.tensor(-np.asarray(slopes, dtype=np.float32))))

    def lightning_attention(q: Any, k: Any, v: Any, decay: Any, past_state: Any) -> Any:
        heads = config.num_attention_heads
        return op.LinearAttention(
            q, k, v, past_state, decay, q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0
        )

    def place_images(x: Any, features: Any, positions: Any) -> Any:
        zero = base.Constant(value_int=0)
        own = base.Unsqueeze(base.Less(positions, zero), base.Constant(value_ints=[-1]))
        return base.Where(own, x, base.Gather(features, base.Max(positions, zero), axis=0))

    def rotary_angles(positions: Any, frequencies: Sequence[float]) -> Any:
        column = base.Unsqueeze(base.Cast(positions, to=ir.DataType.FLOAT), base.Constant(value_ints=[-1]))
        return base.Mul(column, base.Constant(value=ir.tensor(np.asarray(frequencies, dtype=np.float32))))

    def rotary_embedding(x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, rotary_embedding_dim=config.rotary_dim)

    def append_to_cache(cache: Any, new: Any, past_lengths: Any) -> Any:
        return op.TensorScatter(cache, new, past_lengths, axis=2)

    def softmax_attention(q: Any, key: Any, value: Any, past_lengths: Any) -> Any:
        # The operator lines the last query up with the last of nonpad_kv_seqlen keys. Counting the padded tokens in makes that
        # offset past_lengths for every row, ragged or not; keys of padding lie behind every valid query and stay unseen.
        written = base.Add(past_lengths, base.Shape(q, start=2, end=3))
        output, *_unused = op.Attention(q, key, value, None, None, None, written, is_causal=1)
        return output

    def scaled(x: Any, factor: float) -> Any:
        if factor == 1.0:
            return x
        if x.dtype == ir.DataType.FLOAT:
            return base.Mul(x, base.Constant(value_float=factor))
        wide = base.Mul(base.Cast(x, to=ir.DataType.FLOAT), base.Constant(value_float=factor))
        return base.Cast(wide, to=x.dtype)

    def scaled_residual(normed: Any, branch: Any, alpha: float, beta: float) -> Any:
        return base.Add(scaled(normed, alpha), scaled(branch, beta))

    def mixture_of_experts(x: Any, router_logits: Any, fc1: Any, fc2: Any, top_k: int) -> Any:
        return contrib.MoE(
            x,
            router_logits,
            fc1,
            None,
            fc2,
            k=top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
        )

    def arange(end: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Any:
        # Only whole numbers from 0 are counted in this model; torch's own translation goes through floating point.
        return base.Range(base.Constant(value_int=0), end, base.Constant(value_int=1))

    def split(x: Any, size: int, axis: int) -> Any:
        # torch's own translation makes a sequence value, which few runtimes like.
        parts = x.shape[axis] // size
        return base.Split(x, axis=axis, num_outputs=parts)

    ours = torch.ops.mxcompile
    return {
        torch.ops.aten.arange.default: arange,
        torch.ops.aten.split.Tensor: split,
        ours.rms_norm.default: rms_norm,
        ours.log_decay.default: log_decay,
        ours.lightning_attention.default: lightning_attention,
        ours.place_images.default: place_images,
        ours.rotary_angles.default: rotary_angles,
        ours.rotary_embedding.default: rotary_embedding,
        ours.append_to_cache.default: append_to_cache,
        ours.scaled_residual.default: scaled_residual,
        ours.softmax_attention.default: softmax_attention,
        ours.mixture_of_experts.default: mixture_of_experts,
    }
