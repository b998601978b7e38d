"""Build a TensorRT engine ahead of time from the canonical graph."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np
import onnx_ir as ir

from engines.config import Checkpoint, EngineConfig, Limits, Mapping, RankFiles
from engines.contract import port, states
from engines.directory import EngineFiles
from engines.errors import ENVIRONMENT, EngineError
from engines.placing import Progress, place_weights
from engines.tensorrt.gpus import Gpu, aim_at
from engines.tensorrt.lengths import attention_for, capacity_for
from engines.tensorrt.lowering import Attention, lower
from engines.tensorrt.messages import failure, make_logger, started
from engines.tensorrt.network import INLINE_LIMIT, allow_collectives, describe_layers, parse
from engines.tensorrt.profiles import Shapes, add_profiles
from engines.tensorrt.stream import Write, make_writer
from engines.tensorrt.timing import TimingCache

DEFAULT_PREFILL_CHUNK = 2048
DTYPES = ("bfloat16", "float16")
TOKEN_INPUTS = ("input_ids", "new_lengths", "past_lengths", "logit_positions")


@dataclass(frozen=True)
class BuildRequest:
    """Everything about an engine that the graph itself does not say."""

    model: dict[str, Any]
    target: str  # "tensorrt" or "tensorrt-rtx"
    gpu: Gpu
    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    dtype: str = "bfloat16"
    strip_weights: bool = False  # keep them out of the plan; a session binds them
    quantization: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    taps: Sequence[str] = ()  # inner values that the plan gives out beside its results
    mapping: Mapping = field(default_factory=Mapping)
    rank: int = 0
    mxcompile_version: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # kept in the configuration as they are
    verbose: bool = False

    @property
    def chunk(self) -> int:
        """Most new tokens of one step."""
        return min(self.prefill_chunk, self.max_seq_len)

    @property
    def capacity(self) -> int:
        """Positions of the key/value cache."""
        return capacity_for(self.max_seq_len)

    @property
    def attention(self) -> Attention:
        """How lengths reach attention."""
        return attention_for(self.max_batch_size, self.chunk, self.capacity)


def build(
    model: ir.Model,
    writer: EngineFiles,
    request: BuildRequest,
    progress: Progress | None = None,
    plugin_folder: Path | None = None,
) -> EngineConfig:
    """Lower `model` in place, compile it for `request.gpu` and write its files with `writer`; commit them yourself.

    Initializers are `ir.ExternalTensor` (their file is mapped) or lazy tensors (made one at a time and parked in a file, so that
    memory holds one of them). With `strip_weights` they become inputs of the plan, which is then small: those that are made of bytes of
    the checkpoint stay there, others are written beside the plan. Raises EngineError with TensorRT's own reason; exit code 3
    where TensorRT or the plugin library is missing.
    """
    return build_rank(model, writer, request, progress, plugin_folder)[0]


def build_rank(
    model: ir.Model,
    writer: EngineFiles,
    request: BuildRequest,
    progress: Progress | None = None,
    plugin_folder: Path | None = None,
) -> tuple[EngineConfig, CompiledPlan]:
    """As `build`, for the one rank that `request` names; also what is known of its plan."""
    report = progress or (lambda stage, done, total: None)
    if request.dtype not in DTYPES:
        raise EngineError(
            f"target {request.target} runs {' and '.join(DTYPES)}, not {request.dtype}; give --dtype bfloat16"
        )
    trt, plugins = load_runtime(request.target, plugin_folder)
    check_supported(request.target, str(trt.__version__), request.mapping.tp_size)
    lower_graph(model, request, report)
    weights_name = None
    assert writer.path is not None
    with tempfile.TemporaryFile(dir=writer.path) as parking:
        if request.strip_weights:
            weights_name, data_name = f"rank{request.rank}.weights.json", f"rank{request.rank}.weights.bin"
            manifest = place_weights(
                model, writer, data_name, request.checkpoint, report, dtype_of=_dtype, assembled=True
            )
            writer.write(weights_name, manifest.to_json())
            weights_to_inputs(model, [record.name for record in manifest.tensors])
            weights = {}
        else:
            weights = dict(_arrays(model, parking, report))
        graph_name = f"rank{request.rank}.engine"
        with writer.open(graph_name) as file:
            compiled = compile_plan(trt, model, weights, request, file.write, report)
        del weights
    writer.write(f"rank{request.rank}.layers.json", json.dumps(compiled.layers))
    own_inputs = [value for value in model.graph.inputs if value.name not in compiled.weight_inputs]
    config = EngineConfig(
        mxcompile_version=request.mxcompile_version,
        target=request.target,
        model=request.model,
        dtype=request.dtype,
        quantization=request.quantization,
        mapping=request.mapping,
        limits=Limits(request.max_batch_size, request.max_seq_len, request.chunk),
        inputs=[port(value) for value in own_inputs],
        outputs=[port(value) for value in model.graph.outputs],
        states=list(states(model.graph)),
        ranks=[RankFiles(request.rank, graph_name, weights_name)],
        taps=list(request.taps),
        checkpoint=request.checkpoint,
        versions={request.target: trt.__version__, "plugins_tensorrt_headers": plugins.headers} | request.versions,
        options={
            "gpu": request.gpu.name,
            "compute_capability": request.gpu.capability,
            "attention": request.attention,
            "capacity": request.capacity,
            "max_positions": _shapes(request).max_positions,
            "strip_weights": request.strip_weights,
            "warnings": compiled.warnings,
            "memory": [compiled.memory],
        }
        | request.options,
    )
    return config, compiled


@dataclass(frozen=True)
class CompiledPlan:
    """What is known of a plan that was written: its bytes, its layers, which inputs are weights, TensorRT's warnings."""

    size: int
    layers: list[dict[str, Any]]
    weight_inputs: frozenset[str]
    warnings: list[str]
    memory: dict[str, Any]  # as TensorRT tells it: bytes of activations by profile, and of weights inside the plan


def lower_graph(model: ir.Model, request: BuildRequest, report: Progress) -> None:
    """Lower `model` in place as `request` wants it. EngineError where it is not canonical."""
    report("lower", 0, 1)
    give_out(model, request.taps)
    try:
        lower(model, request.capacity, request.attention)
    except (ValueError, ir.passes.PassError) as error:
        raise EngineError(f"the graph cannot be lowered to TensorRT: {error.__cause__ or error}") from error
    report("lower", 1, 1)


def give_out(model: ir.Model, names: Sequence[str]) -> None:
    """Let inner values be outputs of the graph as well. EngineError where there is none of that name."""
    values = {output.name: output for node in model.graph for output in node.outputs} if names else {}
    for name in names:
        if name not in values:
            raise EngineError(f"the graph has no value {name!r} to tap")
        model.graph.outputs.append(values[name])


def weights_to_inputs(model: ir.Model, names: Sequence[str]) -> None:
    """Let initializers be graph inputs instead, behind all others."""
    for name in names:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)


def compile_plan(
    trt: Any, model: ir.Model, weights: dict[str, np.ndarray], request: BuildRequest, write: Write, report: Progress
) -> CompiledPlan:
    """Compile a lowered graph. `weights`: the arrays of its external initializers; TensorRT reads them where they lie. The plan goes
    through `write`, piece by piece.
    """
    logger = make_logger(trt, request.verbose)
    builder = started(trt.Builder, "builder", logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    aim_at(trt, config, request.gpu, request.target)
    if request.mapping.tp_size > 1:
        allow_collectives(trt, config)
    timings = TimingCache.of(trt, config, request.target, request.gpu)
    parser = parse(trt, network, logger, model, weights)
    add_profiles(builder, config, network, _shapes(request))
    monitor = config.progress_monitor = _monitor(trt, report)
    writer = make_writer(trt, write)
    built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built or writer.size == 0:
        raise failure("building the engine", logger)
    timings.keep(config)
    bound = {value.name for value in model.graph.inputs if value.name and is_weight(value.name)}
    layers = describe_layers(network, model)
    del parser, monitor
    memory = {"activations": logger.activation_bytes, "weights": logger.weight_bytes}
    return CompiledPlan(writer.size, layers, frozenset(bound), logger.warnings[:20], memory)


def is_weight(name: str) -> bool:
    """Whether a graph input is a weight rather than tokens, lengths or a state."""
    return name not in TOKEN_INPUTS and not name.startswith("past_key_values.")


def _shapes(request: BuildRequest) -> Shapes:
    return Shapes(request.max_batch_size, request.chunk, int(request.model["vocab_size"]))


def _dtype(name: str, tensor: Any) -> str:
    return str(tensor.dtype.numpy().name)


def load_runtime(target: str, plugin_folder: Path | None) -> tuple[Any, Any]:
    """TensorRT's Python module and the registered plugin library. EngineError (exit code 3) where one is missing."""
    from plugins.errors import PluginsError
    from plugins.tensorrt_runtime import load_plugins, load_tensorrt

    try:
        trt = load_tensorrt(target)
        return trt, load_plugins(trt, plugin_folder)
    except PluginsError as error:
        raise EngineError(str(error), exit_code=ENVIRONMENT) from error


def check_supported(target: str, version: str, ranks: int) -> None:
    """EngineError (exit code 3) for a TensorRT that lacks what the graphs need: 10.15 has the cache layer, 10.16 exchanges between ranks.

    Of TensorRT-RTX, `plugins.tensorrt_runtime` asks for 1.7, which has both.
    """
    needed = (10, 15) if ranks == 1 else (10, 16)
    found = tuple(int(part) for part in version.split(".")[:2])
    if target == "tensorrt" and found < needed:
        what = "an engine" if ranks == 1 else "an engine of several ranks"
        raise EngineError(
            f"tensorrt {version} is too old for {what}: {needed[0]}.{needed[1]} or later is needed; "
            "run `pip install 'tensorrt-cu13>=10.16,<11'`",
            exit_code=ENVIRONMENT,
        )


def _arrays(model: ir.Model, parking: Any, report: Progress) -> Iterator[tuple[str, np.ndarray]]:
    """Mapped arrays of all large initializers, which become references in the graph."""
    large = [value for value in model.graph.initializers.values() if _is_large(value)]
    total = sum(value.const_value.nbytes for value in large if value.const_value is not None)
    done = 0
    for value in large:
        tensor = value.const_value
        assert tensor is not None
        assert value.name is not None
        dtype = tensor.dtype.numpy()
        shape = tuple(tensor.shape.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            array = _mapped(str(tensor.path), tensor.offset or 0, dtype, shape)
        else:
            offset = parking.seek(0, 2)
            parking.write(b"\0" * (-offset % 64))
            offset = parking.tell()
            parking.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
            parking.flush()
            array = _mapped(parking.fileno(), offset, dtype, shape)
        value.const_value = ir.ExternalTensor(
            "bound", 0, array.nbytes, tensor.dtype, shape=ir.Shape(shape), name=value.name
        )
        done += array.nbytes
        report("bind weights", done, total)
        yield value.name, array


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None:
        raise EngineError(f"weight {value.name} has no bytes; bind the graph to a checkpoint before building")
    return isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) or tensor.nbytes > INLINE_LIMIT


def _mapped(file: str | int, offset: int, dtype: Any, shape: Sequence[int]) -> np.ndarray:
    source: Any = file if isinstance(file, str) else f"/proc/self/fd/{file}"
    return (
        np.asarray(np.memmap(source, np.uint8, "r", offset, int(np.prod(shape)) * dtype.itemsize))
        .view(dtype)
        .reshape(shape)
    )


def _monitor(trt: Any, report: Progress) -> Any:
    """TensorRT's progress as ours: its outermost phase counts."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.outermost: str | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost, self.steps[name] = name, steps
                report("build", 0, steps)

        def phase_finish(self, name: str) -> None:
            if name == self.outermost:
                report("build", self.steps[name], self.steps[name])

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outermost:
                report("build", step, self.steps[name])
            return True  # go on

    return Monitor()
