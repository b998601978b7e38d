"""Give a built engine the weights of another checkpoint of the same model: only weight files and digests change.

Works where weights lie outside the compiled graph: ONNX Runtime engines, and TensorRT engines built with --strip-weights. Nothing is
traced, lowered or compiled; every weight is bound, cut and quantized as the build did it, to the form that the engine's list of weights
has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engines.config import Checkpoint as CheckpointReference
from engines.config import EngineConfig, RankFiles
from engines.directory import EngineDirWriter, read_config, verify_files
from engines.weights import Manifest, WeightRecord, map_weights
from mxcompile.errors import MxcompileError
from mxcompile.exporting import open_checkpoint, peak_memory
from mxcompile.progress import Progress, SilentProgress, StageClock
from mxcompile.quantized import described
from mxcompile.same_model import first_difference

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.quantize import QuantizationError
    from export.weights import Source
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.config import ModelConfig

BUILD_KEY = "build_key"  # of the options: says what a TensorRT engine was built from, which a refitted one was not
_RANK_FILE = re.compile(r"rank\d+\.")
_SCALE = ".scale"


@dataclass(frozen=True)
class RefitSummary:
    """What a refit wrote. Sizes and memory in bytes, times in seconds."""

    output: str
    checkpoint: str
    weights: int  # how many were bound anew
    written_bytes: int
    referenced_bytes: int  # that stay in the checkpoint
    seconds: dict[str, float]
    peak_memory: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def refit(engine: str | Path, checkpoint: str | Path, *, progress: Progress | None = None) -> RefitSummary:
    """Replace the weights of the engine directory `engine` by those of the checkpoint in the folder `checkpoint`.

    The engine is replaced whole or not at all: until the new one is complete, and whenever something fails, the old one stays. Reports
    in it are dropped, as they speak of other weights.

    Raises an exception whose `exit_code` is 2 where the checkpoint is of another model or damaged, or where the engine holds its weights
    inside the plan; 3 for a lack of space.
    """
    clock = StageClock(progress or SilentProgress())
    folder = Path(engine)
    with clock.stage("read"):
        config = read_config(folder)
        verify_files(folder, config)
        _check_weights_outside(folder, config)
        layers = config.num_layers if config.options.get("layers") is not None else None
        opened, model = open_checkpoint(Path(checkpoint), layers, vision=config.vision is not None)
        _check_same_model(config, model, opened.folder)
        reference = CheckpointReference(str(opened.folder), opened.fingerprint())
    bound = written = referenced = 0
    errors: list[QuantizationError] = []
    with EngineDirWriter(folder, force=True) as writer:
        _keep_files(folder, config, writer)
        with clock.stage("bind weights", len(config.ranks)) as stage:
            for files in _with_own_weights(config.ranks):
                manifest = _Rank(folder, config, files, model, opened, errors).write(writer, reference)
                bound += len(manifest.tensors)
                of_engine = [manifest.is_written(record) for record in manifest.tensors]
                sizes = [record.nbytes for record in manifest.tensors]
                written += sum(size for size, own in zip(sizes, of_engine, strict=True) if own)
                referenced += sum(size for size, own in zip(sizes, of_engine, strict=True) if not own)
                stage.advance()
        if model.vision is not None:  # its weights are few: the half is made anew
            from mxcompile.vision_building import add_vision

            config, vision_referenced = add_vision(
                dataclasses.replace(config, checkpoint=reference), model, opened, writer, clock
            )
            referenced += vision_referenced
        for file in opened.tokenizer_files:
            writer.add(file.name, file)
        new = dataclasses.replace(
            config,
            checkpoint=reference,
            quantization=_quantization(config, errors),
            options={name: value for name, value in config.options.items() if name != BUILD_KEY},
        )
        writer.commit(new, check=_checked(clock))
    return RefitSummary(
        output=str(folder),
        checkpoint=str(opened.folder),
        weights=bound,
        written_bytes=written,
        referenced_bytes=referenced,
        seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        peak_memory=peak_memory(),
    )


def _check_weights_outside(folder: Path, config: EngineConfig) -> None:
    if any(files.weights is None for files in config.ranks):
        raise MxcompileError(
            f"{folder}: this engine holds its weights inside the plan and cannot be refitted; build it with --strip-weights, then "
            "it can"
        )


def _check_same_model(config: EngineConfig, model: ModelConfig, folder: Path) -> None:
    """Everything that decides shapes or what is computed must be equal."""
    if config.vision is not None and model.vision is None:
        raise MxcompileError(f"{folder}: has no vision half, but the engine has one; build an engine of it")
    difference = first_difference(config.model, model.to_dict(), "the checkpoint")
    if difference is not None:
        raise MxcompileError(
            f"the engine was built for another model than {folder}: {difference}; build an engine of it"
        )


def _with_own_weights(ranks: list[RankFiles]) -> Iterator[RankFiles]:
    """Ranks that share a weight file with an earlier one are done with it."""
    seen: set[str | None] = set()
    for files in ranks:
        if files.weights not in seen:
            seen.add(files.weights)
            yield files


def _keep_files(folder: Path, config: EngineConfig, writer: EngineDirWriter) -> None:
    """Everything of the ranks that holds no weights. Tokenizer files are the checkpoint's."""
    lists = {files.weights for files in config.ranks}
    for name, record in config.files.items():
        if _RANK_FILE.match(name) and name not in lists and not name.endswith(".weights.bin"):
            writer.keep(name, folder / name, record)


def _quantization(config: EngineConfig, errors: list[QuantizationError]) -> dict[str, Any] | None:
    if config.quantization is None:
        return None
    total = errors[0]
    for error in errors[1:]:
        total = total + error
    return described(config.quantization, total)


def _checked(clock: StageClock) -> Callable[[Path], None]:
    """As a build does it: an ONNX Runtime engine is run once before it takes its place; TensorRT needs a GPU for that."""

    def check(folder: Path) -> None:
        if read_config(folder).target == "onnxruntime":
            from mxcompile.building import run_once

            with clock.stage("verify"):
                run_once(folder, None)

    return check


class _Rank:
    """The weights of one rank."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        files: RankFiles,
        model: ModelConfig,
        checkpoint: Checkpoint,
        errors: list[QuantizationError],
    ) -> None:
        from export.parallel.mapping import ParallelMapping
        from export.parallel.plan import ShardingPlan
        from model_defs.weights import weight_recipes

        assert files.weights is not None
        self._folder, self._config, self._files, self._checkpoint = folder, config, files, checkpoint
        mapping = config.mapping
        self._plan = ShardingPlan(model, ParallelMapping.of(mapping.tp_size, mapping.moe_tp_size, mapping.moe_ep_size))
        self._rank = files.rank % mapping.tp_size
        self._recipes = weight_recipes(model)
        self._errors = errors
        self._source = folder / files.weights
        self._old = Manifest.from_json(self._source.read_text(encoding="utf-8"), str(self._source))

    def write(self, writer: EngineDirWriter, reference: CheckpointReference) -> Manifest:
        """The rank's weight file and list, as a build from the checkpoint would have written them."""
        import onnx_ir as ir

        from engines.placing import place_weights

        missing = sorted(set(self._recipes) - {record.name for record in self._old.tensors})
        if missing:
            raise MxcompileError(f"{self._source}: does not list the weight {missing[0]}; build the engine again")
        values = self._values()
        compiled = self._config.target != "onnxruntime"
        kept = {record.name for record in self._old.tensors if self._old.is_written(record) and not compiled}
        graph = ir.Graph([], [], nodes=[], initializers=values, name="weights")
        data_name = next(file.name for file in self._old.files if file.root == "engine")
        types = {record.name: record.dtype for record in self._old.tensors}
        manifest = place_weights(
            ir.Model(graph, ir_version=10),
            writer,
            data_name,
            reference,
            lambda stage, done, total: None,
            dtype_of=lambda name, tensor: types[name],
            own_copy=lambda value: value.name in kept,
            assembled=compiled,
        )
        manifest = dataclasses.replace(manifest, parts=self._old.parts)
        assert self._files.weights is not None
        writer.write(self._files.weights, manifest.to_json())
        return manifest

    def _values(self) -> list[ir.Value]:
        """One initializer per listed weight, in the order of the list."""
        import onnx_ir as ir

        constants: dict[str, Any] = {}
        scales: dict[str, ir.TensorProtocol] = {}
        values = []
        for record in self._old.tensors:
            value = ir.Value(
                name=record.name, type=ir.TensorType(_onnx_type(record.dtype)), shape=ir.Shape(record.shape)
            )
            if record.name in self._recipes and f"{record.name}{_SCALE}" in {r.name for r in self._old.tensors}:
                value.const_value, scales[f"{record.name}{_SCALE}"] = self._quantized(record)
            elif record.name in self._recipes:
                value.const_value = self._bound(value)
            elif record.name in scales:
                value.const_value = scales[record.name]
            else:  # a constant of the graph
                constants = constants or map_weights(self._folder, self._config, self._source.name)
                value.const_value = ir.tensor(constants[record.name], name=record.name)
            values.append(value)
        return values

    def _bound(self, value: ir.Value) -> ir.TensorProtocol:
        from export.parallel.weights import rank_tensor
        from export.weights import bound_tensor

        assert value.name is not None
        recipe, source = self._recipes[value.name], cast("Source", self._checkpoint)
        if self._plan.mapping.tp_size == 1:
            return bound_tensor(value.name, recipe, value, source)
        return rank_tensor(value.name, recipe, value, self._plan, self._rank, source)

    def _quantized(self, record: WeightRecord) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        import onnx_ir as ir

        from engines.tensorrt.lowering.signed_experts import signed
        from export.quantize import QuantizationError, quantized
        from export.quantize_blocks import quantized_blocks
        from export.weights import ExpertTensor
        from model_defs.quantization import block_scheme

        # The shape as it is in the model: stored, two 4-bit numbers share a byte, and a rank has a part of it.
        by_blocks = (self._config.quantization or {}).get("weights")
        shape = self._plan.held_shape(record.name) if by_blocks else tuple(record.shape)
        experts = self._bound(ir.Value(name=record.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)))
        self._errors.append(QuantizationError())
        if by_blocks:
            scheme = block_scheme(record.name, by_blocks)
            assert scheme is not None
            return quantized_blocks(experts, scheme, self._errors[-1])
        assert isinstance(experts, ExpertTensor)
        weights, scales = quantized(experts, self._errors[-1])
        return (signed(weights) if record.dtype == "int8" else weights), scales


def _onnx_type(dtype: str) -> ir.DataType:
    import numpy as np
    import onnx_ir as ir

    return ir.DataType.from_numpy(np.dtype(dtype))
