"""Build an ONNX Runtime engine: lower the canonical graph, write it without weight bytes, and place the weights.

Weights whose bytes ONNX Runtime can use as they lie in the checkpoint stay there; derived ones (stacked experts,
widened types) are written to `rank{r}.weights.bin`, one at a time, so memory holds at most one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import onnx_ir as ir

from engines.config import Checkpoint, EngineConfig, Limits, Mapping, RankFiles
from engines.contract import port, states
from engines.directory import EngineFiles
from engines.errors import EngineError
from engines.onnxruntime.kernels import without_kernel
from engines.onnxruntime.lowering import GroupExperts, lower, lower_expert_ranges, lower_for_cuda
from engines.placing import Progress, place_weights

TARGET = "onnxruntime"
# Types of weights that ONNX Runtime's CPU kernels take.
DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
CUDA_DTYPES = (*DTYPES, "bfloat16")
DEFAULT_PREFILL_CHUNK = 512


@dataclass(frozen=True)
class BuildRequest:
    """Everything about an engine that the graph itself does not say."""

    model: dict[str, Any]
    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    taps: Sequence[str] = ()
    mapping: Mapping = field(default_factory=Mapping)
    rank: int = 0
    mxcompile_version: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"  # or "cuda"


def build(
    model: ir.Model, writer: EngineFiles, request: BuildRequest, progress: Progress | None = None
) -> EngineConfig:
    """Lower `model` in place and write one rank's files with `writer`; commit the directory yourself.

    Initializers are `ir.ExternalTensor` (bytes used where they lie when inside the checkpoint's folder),
    `ir.LazyTensor` or any other tensor with `numpy()` (written out). Returns the configuration to commit. Raises
    EngineError when the graph is not canonical, a weight type has no CPU kernel or the disk is too small.
    """
    report = progress or (lambda stage, done, total: None)
    for name in ("max_batch_size", "max_seq_len", "prefill_chunk"):
        if getattr(request, name) < 1:
            raise EngineError(f"{name} must be at least 1, not {getattr(request, name)}")
    report("lower", 0, 1)
    cuda = request.device == "cuda"
    try:
        (lower_for_cuda if cuda else lower)(model)
    except (ValueError, ir.passes.PassError) as error:
        raise EngineError(f"the graph cannot be lowered to ONNX Runtime: {error.__cause__ or error}") from error
    report("lower", 1, 1)
    graph_name, weights_name = f"rank{request.rank}.onnx", f"rank{request.rank}.weights.json"
    data_name = f"rank{request.rank}.weights.bin"
    manifest = place_weights(
        model,
        writer,
        data_name,
        request.checkpoint,
        report,
        dtype_of=cuda_weight_dtype if cuda else weight_dtype,
        own_copy=_may_be_folded,
    )
    missing = [tap for tap in request.taps if tap not in {out.name for node in model.graph for out in node.outputs}]
    if missing:
        raise EngineError(f"the graph has no value {missing[0]!r} to tap")
    if cuda:
        if request.mapping.tp_size * request.mapping.cp_size > 1:
            raise EngineError("engines for CUDA have one rank")
        write_graph(writer, graph_name, model)
        writer.write(weights_name, manifest.to_json())
        options = {"device": "cuda", "capacity": request.max_seq_len + 1, "on_cpu": without_kernel(model)}
        return replace(_config(model, request, graph_name, weights_name, None), options=options)
    group = GroupExperts()
    grouped = ir.from_proto(ir.to_proto(model))
    prefill_name = f"rank{request.rank}.prefill.onnx" if group(grouped).modified else None
    if request.mapping.cp_size > 1:
        prefill_name = None  # every rank has its own: `engines.parallel.segments`
    write_graph(writer, graph_name, lower_expert_ranges(model))
    if prefill_name is not None:
        write_graph(writer, prefill_name, grouped)
    writer.write(weights_name, replace(manifest, parts=group.parts).to_json())
    return _config(model, request, graph_name, weights_name, prefill_name)


def _config(
    model: ir.Model, request: BuildRequest, graph_name: str, weights_name: str, prefill_name: str | None
) -> EngineConfig:
    return EngineConfig(
        mxcompile_version=request.mxcompile_version,
        target=TARGET,
        model=request.model,
        dtype=request.dtype,
        quantization=request.quantization,
        mapping=request.mapping,
        limits=Limits(request.max_batch_size, request.max_seq_len, min(request.prefill_chunk, request.max_seq_len)),
        inputs=[port(value) for value in model.graph.inputs],
        outputs=[port(value) for value in model.graph.outputs],
        states=list(states(model.graph)),
        ranks=[RankFiles(request.rank, graph_name, weights_name, prefill_name)],
        taps=list(request.taps),
        checkpoint=request.checkpoint,
        versions={"onnx": onnx.__version__, "onnx_ir": ir.__version__} | request.versions,
    )


def weight_dtype(name: str, tensor: Any) -> str:
    """numpy's name of a weight's type. Raises EngineError for one that the CPU kernels do not take."""
    dtype = tensor.dtype.numpy().name
    if dtype not in DTYPES:
        raise EngineError(f"weight {name} is {dtype}, which ONNX Runtime's CPU kernels do not take; build with float32")
    return dtype


def cuda_weight_dtype(name: str, tensor: Any) -> str:
    """The same for the CUDA provider, which also takes bfloat16."""
    dtype = tensor.dtype.numpy().name
    return dtype if dtype in CUDA_DTYPES else weight_dtype(name, tensor)


def _may_be_folded(value: ir.Value) -> bool:
    """Whether ONNX Runtime could compute a user of this weight while it loads the graph.

    It would look for the bytes where the graph file says, and for a weight in the checkpoint that is a placeholder.
    """
    return any(all(_is_constant(other) for other in usage.node.inputs) for usage in value.uses())


def _is_constant(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return value is None or value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def write_graph(writer: EngineFiles, name: str, model: ir.Model) -> None:
    """Write it and let ONNX's checker see its standard part; the runtime's own operators have no schema there."""
    with writer.open(name) as file:
        file.write(ir.to_proto(model).SerializeToString())
    assert writer.path is not None
    try:
        onnx.checker.check_model(str(writer.path / name))
    except onnx.checker.ValidationError as error:
        raise EngineError(f"the lowered graph is not valid ONNX: {error}") from error
