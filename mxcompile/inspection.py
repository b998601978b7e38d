"""What an engine directory, a checkpoint or an ONNX file holds, as plain values. Nothing is run, no weight is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxcompile.errors import MxcompileError

if TYPE_CHECKING:
    from engines.config import EngineConfig
    from model_defs.config import ModelConfig

_ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def inspect(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe what lies at `path`; the key "kind" is "engine", "checkpoint" or "onnx".

    `verify` reads every byte of an engine's files and compares whole digests. Raises an exception with exit code 2
    when the thing cannot be recognised or is damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".onnx":
        return inspect_onnx(path)
    if not path.exists():
        raise MxcompileError(f"{path}: does not exist; give an engine directory, a checkpoint folder or an ONNX file")
    if not path.is_dir():
        raise MxcompileError(f"{path}: is neither a folder nor an .onnx file")
    return inspect_engine(path, verify=verify) if _is_engine(path) else inspect_checkpoint(path)


def inspect_engine(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe an engine directory; sizes and digests of its files are checked (wholly with `verify`)."""
    from engines.directory import read_config, verify_files
    from mxcompile.engine_memory import memory_of

    config = read_config(path)
    verify_files(path, config, whole=verify)
    graphs = [path / rank.graph for rank in config.ranks if rank.graph.endswith(".onnx")]
    return {
        "kind": "engine",
        "path": str(path),
        "target": config.target,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "built_by": f"mxcompile {config.mxcompile_version}",
        "versions": config.versions,
        "limits": {
            "max_batch_size": config.limits.max_batch_size,
            "max_seq_len": config.limits.max_seq_len,
            "prefill_chunk": config.limits.prefill_chunk,
        },
        "mapping": {
            "tp_size": config.mapping.tp_size,
            "moe_tp_size": config.mapping.moe_tp_size,
            "moe_ep_size": config.mapping.moe_ep_size,
            "cp_size": config.mapping.cp_size,
        },
        "checkpoint": {"path": config.checkpoint.path, "fingerprint": config.checkpoint.fingerprint}
        if config.checkpoint
        else None,
        **_architecture_of_engine(config),
        "state": _state_of_engine(config),
        "memory": memory_of(path, config),
        "inputs": {port.name: f"{port.dtype} {_dims(port.dims)}" for port in config.inputs},
        "outputs": {port.name: f"{port.dtype} {_dims(port.dims)}" for port in config.outputs},
        "operators": dict(_operators(graphs[0])) if graphs else {},
        **_compiled(path, config),
        "files": {
            name: {"bytes": record.size, "sha256": record.sha256, "checked": "whole" if verify else "sampled"}
            for name, record in sorted(config.files.items())
        },
    }


def _compiled(path: Path, config: EngineConfig) -> dict[str, Any]:
    """Of a TensorRT engine: what it is for, and its layers by kind, by plugin, and by the type of what they give out."""
    import json

    if not config.target.startswith("tensorrt"):
        return {}
    file = path / f"rank{config.ranks[0].rank}.layers.json"
    try:
        layers = json.loads(file.read_text(encoding="utf-8"))
        types = Counter(output["dtype"] for layer in layers for output in layer["outputs"])
        plugins = Counter(layer["plugin"] for layer in layers if layer["plugin"])
        kinds = Counter(layer["plugin"] or layer["type"].lower() for layer in layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MxcompileError(f"{file}: not a list of layers ({error}); rebuild the engine") from error
    shown = ("gpu", "compute_capability", "attention", "capacity", "max_positions", "strip_weights")
    return {
        "operators": dict(kinds.most_common()),
        "plugins": dict(plugins.most_common()),
        "precision": dict(types.most_common()),
        "compiled_for": {name: config.options[name] for name in shown if name in config.options},
    }


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a checkpoint folder; damaged files are listed under "problems" (see also `mxcompile checkpoint
    verify`).
    """
    from model_defs.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path, strict=False)
    dtypes = Counter(entry.dtype for entry in checkpoint.entries.values())
    stored = next(iter(dtypes), "BF16")
    element = {"F32": 4, "F64": 8}.get(stored, 2)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "tensors": len(checkpoint.entries),
        "stored_types": dict(dtypes),
        "total_bytes": checkpoint.total_bytes,
        "fingerprint": checkpoint.fingerprint() if not checkpoint.problems else None,
        "tokenizer": [file.name for file in checkpoint.tokenizer_files],
        "problems": [str(problem) for problem in checkpoint.problems],
        **_architecture(checkpoint.config),
        "state": _state(checkpoint.config, element),
    }


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Describe an ONNX file by its graph alone; external weights are not opened."""
    model = _load_onnx(path)
    graph = model.graph
    kinds: Counter[str] = Counter()
    for initializer in graph.initializer:
        count = 1
        for dim in initializer.dims:
            count *= dim
        kinds[_kind_of_parameter(initializer.name)] += count
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": path.stat().st_size,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(graph.node),
        "parameters": dict(kinds) | {"total": sum(kinds.values())},
        "inputs": {value.name: _type_text(value) for value in graph.input},
        "outputs": {value.name: _type_text(value) for value in graph.output},
        "operators": dict(_operators_of(model)),
    }


def _is_engine(path: Path) -> bool:
    """Whether the folder's config.json is an engine's; anything unreadable is left to the checkpoint reader to name."""
    import json

    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "schema_version" in values


def _architecture(config: ModelConfig) -> dict[str, Any]:
    kinds = Counter(config.layer_kinds)
    counts = config.all_parameter_counts()
    return {
        "architecture": {
            "family": config.family,
            "layers": f"{config.num_layers} ({kinds['lightning']} lightning, {kinds['softmax']} softmax)",
            "hidden size": config.hidden_size,
            "heads": f"{config.num_attention_heads} of {config.head_dim}, {config.num_key_value_heads} key/value",
            "experts": f"{config.num_local_experts} of {config.intermediate_size}, "
            f"{config.num_experts_per_tok} per token",
            "vocabulary": config.vocab_size,
            "rotary": f"{config.rotary_dim} channels, base {config.rope_theta:g}",
            "positions": config.max_position_embeddings,
            **_vision(config),
        },
        "parameters": counts | {"total": sum(counts.values()), "active per token": config_active(config)},
    }


def _vision(config: ModelConfig) -> dict[str, Any]:
    """The vision half in one line, where there is one."""
    if (vision := config.vision) is None:
        return {}
    text = (
        f"{vision.layers_used} layers of {vision.hidden_size}, tiles of {vision.image_size} pixels and {vision.patches} tokens, "
        f"{len(vision.grid_pinpoints)} resolutions"
    )
    return {"vision": text}


def config_active(config: ModelConfig) -> int:
    """Parameters that one token uses: all but the experts it is not routed to, and one row of the embedding."""
    counts = config.parameter_counts()
    experts = counts["experts"] * config.num_experts_per_tok // config.num_local_experts
    return sum(counts.values()) - counts["experts"] + experts - counts["embedding"] + config.hidden_size


def _architecture_of_engine(config: EngineConfig) -> dict[str, Any]:
    from model_defs.config import ModelConfig

    return _architecture(ModelConfig.from_dict(config.model))


def _state(config: ModelConfig, element: int) -> dict[str, int]:
    return {
        "bytes per sequence": 4 * config.state_elements_per_sequence(),
        "bytes per token": element * config.cache_elements_per_token(),
    }


def _state_of_engine(config: EngineConfig) -> dict[str, int]:
    """As the engine keeps it: recurrent states per sequence, caches per token of capacity, in bytes."""
    per = {"bytes per sequence": 0, "bytes per token": 0}
    for state in config.states:
        elements = _ELEMENT_BYTES.get(state.dtype, 4)
        for dim in state.dims:
            elements *= dim if isinstance(dim, int) else 1
        per["bytes per sequence" if state.role == "recurrent_state" else "bytes per token"] += elements
    return per


def _dims(dims: list[int | str]) -> str:
    return f"[{', '.join(map(str, dims))}]"


def _load_onnx(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise MxcompileError(f"{path}: is not an ONNX file ({error})") from error


def _operators(path: Path) -> Counter[str]:
    """Operators of a graph by name, most frequent first; empty where the onnx package is not installed."""
    try:
        return _operators_of(_load_onnx(path))
    except ImportError:
        return Counter()


def _operators_of(model: Any) -> Counter[str]:
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return Counter(dict(Counter(names).most_common()))


def _kind_of_parameter(name: str) -> str:
    """Kind of a weight of the canonical graph by its name, as `ModelConfig.parameter_counts` sorts them."""
    kinds = {
        "experts": ("fc1.weight", "fc2.weight"),
        "router": ("moe.gate.weight",),
        "embedding": ("embed_tokens.weight",),
        "lm_head": ("lm_head.weight",),
        "lightning attention": ("qkv_proj.weight", "output_gate.weight", "out_proj.weight", "self_attn.norm.weight"),
        "softmax attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        "norms": ("norm.weight",),
    }
    return next((kind for kind, ends in kinds.items() if name.endswith(ends)), "other")


def _type_text(value: Any) -> str:
    import onnx

    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else "?"
    dims = [dim.dim_param or dim.dim_value or "?" for dim in tensor.shape.dim]
    return f"{dtype} {_dims(dims)}"
