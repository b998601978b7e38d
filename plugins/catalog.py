"""What the plugin library offers, as data: `mxcompile plugins list` prints it, lowering and validation ask it.

The C++ code is the authority for what is refused; tests hold this page against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# What `build(archs)` takes. A suffix `a` runs on exactly that compute capability; the others on later ones of the same major.
ARCHITECTURES: tuple[str, ...] = ("80", "86", "89", "90a", "120")

GPU_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "80": "A100, A30",
        "86": "A10, A40, RTX 30",
        "89": "L4, L40, RTX 40",
        "90a": "H20, H100, H200",
        "120": "RTX 50, RTX PRO Blackwell",
    }
)


@dataclass(frozen=True)
class OpInfo:
    """One operator of the library.

    `plugin` is the name TensorRT's registry knows (version and namespace beside it); `onnx` the ONNX operators that it
    computes; `limits` what each dimension or attribute may be, in words.
    """

    name: str
    plugin: str
    onnx: tuple[str, ...]
    dtypes: tuple[str, ...]
    limits: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    summary: str
    version: str = "1"
    namespace: str = ""
    weight_dtypes: tuple[str, ...] = ()
    state_dtype: str | None = None
    head_dims: tuple[int, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES
    aliases: tuple[str, ...] = field(default=())


_MOE_LIMITS: Mapping[str, str] = MappingProxyType(
    {
        "k": "1 to 8, at most the number of experts",
        "activation_type": "swiglu",
        "swiglu_fusion": "1 (gate and up rows interleaved)",
        "activation_alpha": "1",
        "activation_beta": "0",
        "swiglu_limit": "none",
        "use_sparse_mixer": "0",
        "normalize_routing_weights": "0 or 1",
        "first_local_expert": "first of the experts held here; default 0 (our extension, for expert parallelism)",
        "sizes": "hidden and inner multiples of 8 (of 16 with int8 weights); at most 256 experts",
        "many tokens on sm_90a": "CUTLASS grouped GEMM (bf16) only with MXC_MOE_SM90=1: it has not run on a GPU yet",
        "absent inputs": "a tensor with no elements",
    }
)

OPS: tuple[OpInfo, ...] = (
    OpInfo(
        name="LinearAttention",
        plugin="LinearAttention",
        onnx=("ai.onnx::LinearAttention-27", "com.microsoft::LinearAttention-1"),
        dtypes=("float16", "bfloat16"),
        state_dtype="float32",
        head_dims=(64, 128),
        inputs=(
            "query [B, T, H*K]",
            "key [B, T, H*K]",
            "value [B, T, H*K]",
            "past_state [B, H, K, K] float32",
            "decay [B, T, H] float32 or the type of query (log-decay, at most 0)",
        ),
        outputs=("output [B, T, H*K]", "present_state [B, H, K, K] float32"),
        limits=MappingProxyType(
            {
                "update_rule": "linear, gated",
                "kv_num_heads": "equal to q_num_heads",
                "scale": "any finite number; 0 means 1/sqrt(head_dim)",
                "chunk_size": "ignored: chunks are 64 tokens",
                "prefill on sm_90a": "portable kernel; the wgmma one only with MXC_LIGHTNING_SM90=1: it has not run on a GPU yet",
                "past_state": "required with rule gated (zeros at the start of a sequence)",
            }
        ),
        summary="lightning attention: linear attention with one decay per head and token, fp32 state",
    ),
    OpInfo(
        name="MoE",
        plugin="MoE",
        onnx=("com.microsoft::MoE-1",),
        dtypes=("float16", "bfloat16"),
        weight_dtypes=("float16", "bfloat16"),
        inputs=(
            "input [N, D] or [B, T, D]",
            "router_probs [N, E] (logits; float32 or the type of input)",
            "fc1_experts_weights [E, 2*I, D]",
            "fc1_experts_bias (absent)",
            "fc2_experts_weights [E, D, I]",
        ),
        outputs=("output, as input",),
        limits=_MOE_LIMITS,
        summary="mixture of experts: softmax router, top-k, SwiGLU experts, weighted sum",
    ),
    OpInfo(
        name="QMoE",
        plugin="QMoEInt8",
        aliases=("QMoE",),
        onnx=("com.microsoft::QMoE-1",),
        dtypes=("float16", "bfloat16"),
        weight_dtypes=("int8",),
        inputs=(
            "input [N, D] or [B, T, D]",
            "router_probs [N, E] (logits; float32 or the type of input)",
            "fc1_experts_weights [E, 2*I, D] int8",
            "fc1_scales [E, 2*I] (float32 or the type of input)",
            "fc1_experts_bias (absent)",
            "fc2_experts_weights [E, D, I] int8",
            "fc2_scales [E, D]",
        ),
        outputs=("output, as input",),
        limits=MappingProxyType(
            {
                **_MOE_LIMITS,
                "expert_weight_bits": "8 (signed, symmetric; ONNX Runtime's uint8 weights less 128)",
                "block_size": "none: one scale per output row",
                "op name": "QMoEInt8 in models for TensorRT: its parser keeps QMoE for its own 4-bit form",
            }
        ),
        summary="mixture of experts with int8 weights and one scale per output row",
    ),
    OpInfo(
        name="SoftmaxAttention",
        plugin="SoftmaxAttention",
        onnx=(),
        dtypes=("float16", "bfloat16"),
        head_dims=(64, 128),
        inputs=(
            "query [B, H, T, K]",
            "key_cache [B, G, S, K] (the new tokens already written)",
            "value_cache [B, G, S, K]",
            "past_lengths [B] int32 or int64",
            "new_lengths [B], as past_lengths",
        ),
        outputs=("output, as query; zeros past the new length",),
        limits=MappingProxyType(
            {
                "heads": "H a multiple of G",
                "mask": "causal: token t sees positions 0 to past_length + t; nothing behind the length is read",
                "scale": "any finite number; 0, the default, means 1/sqrt(head_dim)",
            }
        ),
        summary="attention over a key/value cache that knows its lengths (our own op, for the TensorRT lowering)",
    ),
)


def find(name: str) -> OpInfo | None:
    """The operator of that name, plugin name or alias, or None."""
    return next((op for op in OPS if name in (op.name, op.plugin, *op.aliases)), None)


def plugin_names() -> tuple[str, ...]:
    """Every name the library registers with TensorRT, sorted."""
    return tuple(sorted({name for op in OPS for name in (op.plugin, *op.aliases)}))


def architecture_for(compute_capability: int) -> str | None:
    """The architecture of ARCHITECTURES to build for on a GPU of 10 * major + minor, or None where none runs there."""
    exact = [arch for arch in ARCHITECTURES if arch.rstrip("af") == str(compute_capability)]
    same_major = [arch for arch in ARCHITECTURES if arch.isdigit() and int(arch) // 10 == compute_capability // 10]
    usable = exact or [arch for arch in same_major if int(arch) <= compute_capability]
    return usable[-1] if usable else None
