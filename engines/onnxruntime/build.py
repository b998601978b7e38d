"""Build an ONNX Runtime engine: lower the canonical graph, write it without weight bytes, and place the weights.

Weights whose bytes ONNX Runtime can use as they lie in the checkpoint stay there; derived ones (stacked experts,
widened types) are written to `rank{r}.weights.bin`, one at a time, so memory holds at most one of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from engines.config import Checkpoint, EngineConfig, Kind, Limits, Mapping, Port, RankFiles, StateTensor
from engines.directory import EngineDirWriter
from engines.errors import ENVIRONMENT, EngineError
from engines.onnxruntime.lowering import GroupExperts, lower
from engines.onnxruntime.weights import ALIGNMENT, DTYPES, Manifest, WeightFile, WeightRecord, checkpoint_file

TARGET = "onnxruntime"
INLINE_LIMIT = 1024  # constants up to this many bytes stay in the graph file
DEFAULT_PREFILL_CHUNK = 512
# progress(stage, done, total) with bytes or nodes as units
Progress = Callable[[str, int, int], None]


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
    prefill_graph: bool = True  # write a second graph for several tokens, where there is one
    mxcompile_version: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)


def build(
    model: ir.Model, writer: EngineDirWriter, request: BuildRequest, progress: Progress | None = None
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
    try:
        lower(model)
    except (ValueError, ir.passes.PassError) as error:
        raise EngineError(f"the graph cannot be lowered to ONNX Runtime: {error.__cause__ or error}") from error
    report("lower", 1, 1)
    graph_name, weights_name = f"rank{request.rank}.onnx", f"rank{request.rank}.weights.json"
    data_name = f"rank{request.rank}.weights.bin"
    manifest = _place_weights(model, writer, data_name, request.checkpoint, report)
    missing = [tap for tap in request.taps if tap not in {out.name for node in model.graph for out in node.outputs}]
    if missing:
        raise EngineError(f"the graph has no value {missing[0]!r} to tap")
    _write_graph(writer, graph_name, model)
    group = GroupExperts()
    prefill_name = None
    if request.prefill_graph and group(grouped := ir.from_proto(ir.to_proto(model))).modified:
        prefill_name = f"rank{request.rank}.prefill.onnx"
        _write_graph(writer, prefill_name, grouped)
    writer.write(weights_name, replace(manifest, parts=group.parts).to_json())
    return EngineConfig(
        mxcompile_version=request.mxcompile_version,
        target=TARGET,
        model=request.model,
        dtype=request.dtype,
        quantization=request.quantization,
        mapping=request.mapping,
        limits=Limits(request.max_batch_size, request.max_seq_len, min(request.prefill_chunk, request.max_seq_len)),
        inputs=[_port(value) for value in model.graph.inputs],
        outputs=[_port(value) for value in model.graph.outputs],
        states=list(_states(model.graph)),
        ranks=[RankFiles(request.rank, graph_name, weights_name, prefill_name)],
        taps=list(request.taps),
        checkpoint=request.checkpoint,
        versions={"onnx": onnx.__version__, "onnx_ir": ir.__version__} | request.versions,
    )


def _place_weights(
    model: ir.Model, writer: EngineDirWriter, data_name: str, checkpoint: Checkpoint | None, report: Progress
) -> Manifest:
    """Decide where each weight's bytes lie, write the derived ones, and point the graph's initializers there."""
    root = Path(checkpoint.path).resolve() if checkpoint is not None else None
    files: list[WeightFile] = []
    index: dict[str, int] = {}
    records: list[WeightRecord] = []
    derived: list[ir.Value] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise EngineError(f"weight {value.name} has no bytes; bind the graph to a checkpoint before building")
        dtype = _dtype(value.name or "", tensor)
        inside = _inside_checkpoint(tensor, root) if not _may_be_folded(value) else None
        if inside is not None and root is not None:
            if inside not in index:
                index[inside] = len(files)
                files.append(checkpoint_file(root, inside))
            assert isinstance(tensor, ir.ExternalTensor)
            shape = list(tensor.shape.numpy())
            records.append(
                WeightRecord(value.name or "", dtype, shape, index[inside], tensor.offset or 0, tensor.nbytes)
            )
            _refer(value, data_name, 0, 0)
        elif isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) or tensor.nbytes > INLINE_LIMIT:
            derived.append(value)
    _need_space(writer, sum(_nbytes(value) for value in derived))
    records += _write_derived(derived, writer, data_name, files, report)
    return Manifest(files, records, {})


def _write_derived(
    derived: list[ir.Value], writer: EngineDirWriter, data_name: str, files: list[WeightFile], report: Progress
) -> list[WeightRecord]:
    """Stream the derived weights into the engine's own file, one in memory at a time."""
    records: list[WeightRecord] = []
    total = sum(_nbytes(value) for value in derived)
    with writer.open(data_name) as file:
        # Never empty: weights that stay in the checkpoint name this file as a placeholder.
        file.write(b"mxcompile weights".ljust(ALIGNMENT, b"\0"))
        for value in derived:
            assert value.const_value is not None
            assert value.name is not None
            array = np.ascontiguousarray(value.const_value.numpy())
            if array.shape != tuple(value.const_value.shape):
                raise EngineError(f"weight {value.name}: {array.shape} arrived for {value.const_value.shape}")
            file.write(b"\0" * (-file.size % ALIGNMENT))
            offset = file.size
            file.write(array.tobytes() if array.nbytes <= INLINE_LIMIT else array.reshape(-1).view(np.uint8).data)
            records.append(
                WeightRecord(value.name, array.dtype.name, list(array.shape), len(files), offset, array.nbytes)
            )
            _refer(value, data_name, offset, array.nbytes)
            report("bind weights", offset + array.nbytes, total)
    written = writer.record(data_name)
    files.append(WeightFile("engine", data_name, written.size, written.sampled))
    return records


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _dtype(name: str, tensor: Any) -> str:
    dtype = tensor.dtype.numpy().name
    if dtype not in DTYPES:
        raise EngineError(f"weight {name} is {dtype}, which ONNX Runtime's CPU kernels do not take; build with float32")
    return dtype


def _may_be_folded(value: ir.Value) -> bool:
    """Whether ONNX Runtime could compute a user of this weight while it loads the graph.

    It would look for the bytes where the graph file says, and for a weight in the checkpoint that is a placeholder.
    """
    return any(all(_is_constant(other) for other in usage.node.inputs) for usage in value.uses())


def _is_constant(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return value is None or value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _inside_checkpoint(tensor: Any, root: Path | None) -> str | None:
    """Name of the checkpoint file the tensor's bytes lie in, if they do."""
    if root is None or not isinstance(tensor, ir.ExternalTensor):
        return None
    path = Path(tensor.path).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


def _refer(value: ir.Value, data_name: str, offset: int, length: int) -> None:
    """Let the graph file name the weight without its bytes; the session binds them by the list of weights."""
    tensor = value.const_value
    assert tensor is not None
    assert value.name is not None
    value.const_value = ir.ExternalTensor(
        data_name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )


def _need_space(writer: EngineDirWriter, needed: int) -> None:
    assert writer.path is not None
    free = shutil.disk_usage(writer.path).free
    if needed > free:
        raise EngineError(
            f"{writer.target}: the engine's weights need {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB "
            "left; free some or choose another output folder",
            exit_code=ENVIRONMENT,
        )


def _write_graph(writer: EngineDirWriter, name: str, model: ir.Model) -> None:
    """Write it and let ONNX's checker see its standard part; the runtime's own operators have no schema there."""
    with writer.open(name) as file:
        file.write(ir.to_proto(model).SerializeToString())
    assert writer.path is not None
    try:
        onnx.checker.check_model(str(writer.path / name))
    except onnx.checker.ValidationError as error:
        raise EngineError(f"the lowered graph is not valid ONNX: {error}") from error


def _port(value: ir.Value) -> Port:
    if value.name is None or value.dtype is None or value.shape is None:
        raise EngineError(f"graph input or output {value.name} has no type or shape")
    dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return Port(value.name, value.dtype.numpy().name, dims)


def _states(graph: ir.Graph) -> Iterator[StateTensor]:
    """The states among the graph's inputs, each with its output, by the names of the canonical contract."""
    outputs = {value.name: value for value in graph.outputs}
    kinds: dict[str, Kind] = {"recurrent_state": "lightning", "key": "softmax", "value": "softmax"}
    for value in graph.inputs:
        prefix, layer, role = [*(value.name or "").split("."), "", ""][:3]
        if prefix != "past_key_values":
            continue
        present = f"present.{layer}.{role}"
        if role not in kinds or not layer.isdigit() or present not in outputs:
            raise EngineError(f"graph input {value.name} is not a state of the canonical contract")
        port = _port(value)
        dims = (
            ["batch", *port.dims[1:]]
            if role == "recurrent_state"
            else ["batch", port.dims[1], "capacity", port.dims[3]]
        )
        assert value.name is not None
        yield StateTensor(int(layer), kinds[role], role, value.name, present, port.dtype, dims)  # type: ignore[arg-type]
