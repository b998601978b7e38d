"""From a checkpoint to a TensorRT engine directory. `mxcompile.building.build` comes here for the two TensorRT targets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engines.config import Checkpoint as CheckpointReference
from engines.config import EngineConfig
from engines.config import Mapping as EngineMapping
from engines.directory import EngineDirWriter, read_config, verify_files
from engines.errors import EngineError
from engines.tensorrt.device import compute_capability
from engines.tensorrt.gpus import Gpu, check_at_hand, find_gpu
from mxcompile import __version__
from mxcompile.building import BuildSummary, StageByName, check_limits, engine_sizes, referenced_bytes
from mxcompile.disk_space import check_space, written_weights
from mxcompile.errors import EnvironmentProblem, MxcompileError
from mxcompile.exporting import graph, open_checkpoint, peak_memory
from mxcompile.progress import Progress, SilentProgress, StageClock
from mxcompile.quantized import asked_for, quantize
from mxcompile.refitting import BUILD_KEY

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.tensorrt.build import BuildRequest
    from export.weights import Source
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.config import ModelConfig


def build_tensorrt(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str,
    dtype: str,
    gpu: str | None = None,
    strip_weights: bool = False,
    quantize_experts: str | None = None,
    taps: bool = False,
    layers: int | None = None,
    max_batch_size: int = 8,
    max_seq_len: int = 4096,
    prefill_chunk: int | None = None,
    tp_size: int = 1,
    moe_tp_size: int | None = None,
    moe_ep_size: int | None = None,
    build_jobs: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildSummary:
    """Compile the checkpoint in a folder into a TensorRT engine directory, whole or not at all; see `mxcompile.building.build`.

    An engine at `output` that was built from the same checkpoint, options and versions is left as it is, unless `force` says to
    build it again. The plugin library is compiled where it is not there. The engine is not run: it is for the GPU called `gpu`,
    which this machine need not have.

    Raises as `build` does; exit code 3 also where TensorRT, or what the plugin library is compiled with, is missing.
    """
    from engines.tensorrt.build import DEFAULT_PREFILL_CHUNK, BuildRequest
    from export.contract import hidden_tap, router_tap
    from export.parallel.mapping import ParallelMapping
    from export.parallel.plan import ShardingPlan

    wanted = find_gpu(gpu, target)
    check_at_hand(wanted, target, compute_capability())
    shown = progress or SilentProgress()
    clock = StageClock(shown)
    with clock.stage("read"):
        opened, config = open_checkpoint(Path(checkpoint), layers)
        check_limits(config, max_batch_size, max_seq_len, prefill_chunk)
        _check_heads(config, target)
        plan = ShardingPlan(config, ParallelMapping.of(tp_size, moe_tp_size, moe_ep_size))
        versions = _versions(target)
        request = BuildRequest(
            model=config.to_dict(),
            target=target,
            gpu=wanted,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk or DEFAULT_PREFILL_CHUNK,
            dtype=dtype,
            strip_weights=strip_weights,
            quantization=asked_for(None, quantize_experts),
            taps=[tap(layer) for layer in range(config.num_layers) for tap in (hidden_tap, router_tap)] if taps else [],
            checkpoint=CheckpointReference(str(opened.folder), opened.fingerprint()),
            mapping=EngineMapping(tp_size, plan.mapping.moe_tp_size, plan.mapping.moe_ep_size),
            mxcompile_version=__version__,
            versions=versions,
        )
        key = _key(request)
        known = None if force else _finished(Path(output), key)
        if known is None:
            needed = written_weights(
                plan, opened, dtype, strip_weights=strip_weights, quantize_experts=quantize_experts
            )
            check_space(needed, Path(output), _less_space(dtype, strip_weights, quantize_experts))
    referenced = 0
    if known is None:
        with EngineDirWriter(output, force=force) as writer:
            _ensure_plugins(wanted, clock)
            with clock.stage("trace"):
                model = graph(config, dtype)
            request = dataclasses.replace(request, options={BUILD_KEY: key, "layers": layers, "target": target})
            if tp_size > 1:
                from mxcompile.rank_building import build_ranks

                with clock.stage("ranks"):
                    engine, referenced = build_ranks(model, plan, opened.folder, writer, request, shown, build_jobs)
            else:
                with StageByName(clock) as report:
                    engine, referenced = _build_engine(model, config, opened, writer, request, report)
            for file in opened.tokenizer_files:
                writer.add(file.name, file)
            engine = writer.commit(engine)
    else:
        engine = known
    return BuildSummary(
        output=str(output),
        target=target,
        dtype=dtype,
        layers=config.num_layers,
        parameters=sum(config.parameter_counts().values()),
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        sizes=engine_sizes(engine),
        referenced_bytes=referenced,
        seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        peak_memory=peak_memory(),
        skipped=known is not None,
    )


def _build_engine(
    model: ir.Model,
    config: ModelConfig,
    checkpoint: Checkpoint,
    writer: EngineDirWriter,
    request: BuildRequest,
    report: StageByName,
) -> tuple[EngineConfig, int]:
    """The files of an engine of one rank; also the bytes that stay in the checkpoint."""
    from engines.tensorrt.build import build
    from export.weights import bind_weights

    bind_weights(model, config, cast("Source", checkpoint))
    error = None if request.quantization is None else quantize(model, request.quantization)
    referenced = referenced_bytes(model, assembled=True) if request.strip_weights else 0
    engine = build(model, writer, request, report)
    return (engine if error is None else dataclasses.replace(engine, quantization=error.described())), referenced


def _less_space(dtype: str, strip_weights: bool, quantize_experts: str | None) -> str:
    hint = "free some or choose another output folder"
    if not strip_weights:
        return f"{hint}, or leave the weights in the checkpoint with --strip-weights"
    copied = "with int8 experts" if quantize_experts else f"in {dtype}"
    return f"{hint} (only weights {copied} are written; those in the checkpoint's own type stay there)"


def _key(request: Any) -> str:
    """Digest of everything that the engine depends on; where the checkpoint lies is not among it."""
    facts = dataclasses.asdict(request)
    facts["checkpoint"] = facts["checkpoint"]["fingerprint"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _finished(output: Path, key: str) -> EngineConfig | None:
    """The engine at `output` if it is whole and was built from the same things."""
    try:
        config = read_config(output)
        if config.options.get(BUILD_KEY) != key:
            return None
        verify_files(output, config)
    except EngineError:
        return None
    return config


def _ensure_plugins(gpu: Gpu, clock: StageClock) -> None:
    """Compile the plugin library for `gpu` where there is none."""
    from plugins import catalog
    from plugins.build import TENSORRT_LIBRARY
    from plugins.build import build as build_plugins
    from plugins.errors import LibraryError, PluginsError
    from plugins.library import library_path

    try:
        library_path(name=TENSORRT_LIBRARY)
        return
    except LibraryError:
        pass
    architecture = catalog.architecture_for(gpu.capability)
    try:
        with clock.stage("compile plugins"):
            build_plugins(catalog.ARCHITECTURES if architecture is None else (architecture,), tensorrt=True)
    except PluginsError as error:
        raise EnvironmentProblem(
            f"the plugin library is not built and cannot be built here: {error} (`mxcompile plugins build` does it apart)"
        ) from error


def _check_heads(config: ModelConfig, target: str) -> None:
    from plugins.catalog import find

    attention = find("LinearAttention")
    known = attention.head_dims if attention is not None else ()
    if config.head_dim not in known:
        raise MxcompileError(
            f"target {target} runs heads of {' or '.join(map(str, known))} channels, this model has {config.head_dim}; "
            "build it for onnxruntime"
        )


def _versions(target: str) -> dict[str, str]:
    import onnx
    import torch

    from plugins.tensorrt_runtime import load_tensorrt

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        target: str(load_tensorrt(target).__version__),
        "system": f"{platform.system()} {platform.machine()}",
    }
