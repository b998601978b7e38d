"""From a checkpoint to an engine directory: the stages of the other packages, strung together."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engines.config import Checkpoint as CheckpointReference
from engines.config import EngineConfig
from engines.config import Mapping as EngineMapping
from engines.directory import EngineDirWriter
from engines.errors import DISAGREEMENT, EngineError
from mxcompile import __version__
from mxcompile.errors import MxcompileError
from mxcompile.exporting import DTYPES, bound_graph, check_choice, graph, open_checkpoint, peak_memory
from mxcompile.progress import Progress, SilentProgress, Stage, StageClock
from mxcompile.quantized import asked_for, described
from mxcompile.quantized import quantize as quantize_graph

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.parallel.plan import ShardingPlan
    from export.weights import Source
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.config import ModelConfig

TARGET_DTYPES = {
    "onnxruntime": ("float32",),
    "tensorrt-rtx": ("bfloat16", "float16"),
    "tensorrt": ("bfloat16", "float16"),
}
"""Targets, and the types of weights and activations that each can run, the default first: ONNX Runtime's CPU kernels of
the contributed operators (LinearAttention, MoE beside an fp32 router) take fp32, our TensorRT plugins the 16-bit types.
"""

CUDA_DTYPES = ("float32", "bfloat16", "float16")
"""The same for ONNX Runtime's CUDA provider."""

QUANTIZATIONS = ("int8",)
WHOLE_QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class BuildSummary:
    """What a build made and what it took. Sizes and memory in bytes, times in seconds."""

    output: str
    target: str
    dtype: str
    layers: int
    parameters: int
    max_batch_size: int
    max_seq_len: int
    sizes: dict[str, int]  # of the engine directory: graph, weights, other, total
    referenced_bytes: int  # weights that are read from the checkpoint where they lie
    seconds: dict[str, float]  # by stage
    peak_memory: int  # most resident memory of this process so far
    skipped: bool = False  # nothing was done: the engine that is there was built from the same things
    on_cpu: list[str] | None = None  # of an engine for CUDA: operators that ONNX Runtime has no kernel for there

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = "onnxruntime",
    dtype: str | None = None,
    gpu: str | None = None,
    device: str = "cpu",
    strip_weights: bool = False,
    quantize: str | None = None,
    quantize_experts: str | None = None,
    taps: bool = False,
    layers: int | None = None,
    max_batch_size: int = 8,
    max_seq_len: int = 4096,
    prefill_chunk: int | None = None,
    tp_size: int = 1,
    moe_tp_size: int | None = None,
    moe_ep_size: int | None = None,
    cp_size: int = 1,
    build_jobs: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildSummary:
    """Compile the checkpoint in a folder into an engine directory, whole or not at all.

    Args:
        dtype: of weights and activations; states and logits are fp32. Default: the target's first of TARGET_DTYPES.
        gpu: what a TensorRT engine is for, by a name of `engines.tensorrt.gpus`; default: the target's usual one.
        device: "cuda" lets ONNX Runtime run the engine with its CUDA provider, which must be here; never tried.
        strip_weights: keep the weights out of a TensorRT engine; it reads them from the checkpoint when it is loaded.
        quantize: "int8" or "int4" keeps all large matrices in 8 or 4 bits, quantized from the checkpoint on the way; products with
            them take activations in int8 (docs/quantization.md). For ONNX Runtime on the CPU.
        quantize_experts: "int8" keeps the experts' weights in 8 bits, quantized from the checkpoint on the way.
        taps: let a TensorRT engine give out what is behind every layer, so that `validate` can name the layer that is off. Every step
            then writes it, so not for use. ONNX Runtime engines do so without.
        layers: take the first ones only; each computes what it does in the full model.
        max_seq_len: most tokens of one sequence, prompt and output together.
        prefill_chunk: tokens of one piece of a long prompt; default: the target's.
        tp_size, moe_tp_size, moe_ep_size: ranks that share the model, and how they share the experts
            (`export.parallel.mapping`).
        cp_size: sets of such ranks that share the tokens of a prefill chunk (`export.parallel.context`).
        build_jobs: ranks to build at a time; default: as many as cores and memory allow, one for `tensorrt`, which times kernels.
        threads: CPU threads; default: the CPUs this process may use.
        force: replace an engine that is at `output`.

    Raises:
        An exception whose `exit_code` is 2 for a bad checkpoint or request, 3 for a lack of space, memory or
        libraries, 1 when the finished engine computes something that is not finite.
    """
    check_choice("target", target, tuple(TARGET_DTYPES))
    known = CUDA_DTYPES if target == "onnxruntime" and device == "cuda" else TARGET_DTYPES[target]
    dtype = known[0] if dtype is None else dtype
    check_choice("dtype", dtype, DTYPES)
    if dtype not in known:
        raise MxcompileError(f"the target {target} runs {', '.join(known)}, not {dtype}; build with --dtype {known[0]}")
    if build_jobs is not None and build_jobs < 1:
        raise MxcompileError(f"--build-jobs is a number of ranks to build at a time, at least 1, not {build_jobs}")
    if quantize_experts is not None:
        check_choice("quantize-experts", quantize_experts, QUANTIZATIONS)
    if quantize is not None:
        _check_quantize(quantize, quantize_experts, target, device)
    if device != "cpu" and (target != "onnxruntime" or tp_size > 1 or cp_size > 1):
        raise MxcompileError(
            "--device is for engines of one rank for onnxruntime; --gpu says what a TensorRT engine is for"
        )
    if device != "cpu" and quantize_experts is not None:
        raise MxcompileError("--quantize-experts for onnxruntime is for the CPU; leave --device out")
    if target != "onnxruntime":
        if cp_size != 1:
            raise MxcompileError(f"the target {target} does not split prompts over ranks; leave --cp-size out")
        from mxcompile.tensorrt_building import build_tensorrt

        return build_tensorrt(
            checkpoint,
            output,
            target=target,
            dtype=dtype,
            gpu=gpu,
            strip_weights=strip_weights,
            quantize_experts=quantize_experts,
            taps=taps,
            layers=layers,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk,
            tp_size=tp_size,
            moe_tp_size=moe_tp_size,
            moe_ep_size=moe_ep_size,
            build_jobs=build_jobs,
            force=force,
            progress=progress,
        )
    if gpu is not None or strip_weights or taps:
        raise MxcompileError(f"--gpu, --strip-weights and --taps are for the TensorRT targets, not for {target}")
    from engines.onnxruntime.devices import providers

    providers(device)
    shown = progress or SilentProgress()
    clock = StageClock(shown)
    with EngineDirWriter(output, force=force) as writer:
        with clock.stage("read"):
            alone = tp_size == 1 and cp_size == 1  # ranks share the text model only
            opened, config = open_checkpoint(Path(checkpoint), layers, vision=alone)
            check_limits(config, max_batch_size, max_seq_len, prefill_chunk)
            plan = _sharding_plan(config, tp_size, moe_tp_size, moe_ep_size, cp_size)
            several = len(plan.mapping.ranks) > 1
            chunk = _shared_chunk(prefill_chunk, max_seq_len, cp_size)
            fingerprint = opened.fingerprint()
            if quantize is not None:
                from export.quantize_blocks import check_blocks

                check_blocks(config, quantize, plan.mapping)
        with clock.stage("trace"), _torch_threads(threads):
            model = graph(config, dtype) if several else bound_graph(config, dtype, opened)

        from engines.onnxruntime.build import BuildRequest
        from engines.onnxruntime.build import build as build_engine
        from export.contract import hidden_tap, router_tap

        how = asked_for(quantize, quantize_experts)
        request = BuildRequest(
            model=config.to_dict(),
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            prefill_chunk=chunk,
            dtype=dtype,
            quantization=how,
            checkpoint=CheckpointReference(str(opened.folder), fingerprint),
            taps=[tap(layer) for layer in range(config.num_layers) for tap in (hidden_tap, router_tap)],
            mxcompile_version=__version__,
            versions=_versions(),
            mapping=EngineMapping(**dataclasses.asdict(plan.mapping)),
            device=device,
        )
        if not several:
            error = None if how is None else quantize_graph(model, how)
            with StageByName(clock) as report:
                referenced = referenced_bytes(model)
                engine = build_engine(model, writer, request, report)
            if how is not None and error is not None:
                engine = dataclasses.replace(engine, quantization=described(how, error))
        else:
            from mxcompile.rank_building import build_ranks

            with clock.stage("ranks"):
                engine, referenced = build_ranks(model, plan, opened.folder, writer, request, shown, build_jobs)
            if cp_size > 1:
                with StageByName(clock) as report:
                    engine = _build_segments(engine, model, plan, writer, report, opened, how)
        if config.vision is not None:
            from mxcompile.vision_building import add_vision

            engine, vision_referenced = add_vision(engine, config, opened, writer, clock)
            referenced += vision_referenced
        with clock.stage("build"):
            for file in opened.tokenizer_files:
                writer.add(file.name, file)
            engine = dataclasses.replace(
                engine, options=engine.options | {"layers": layers, "target": target, "device": device}
            )

        def verified(folder: Path) -> None:
            with clock.stage("verify"):
                run_once(folder, threads)

        engine = writer.commit(engine, check=verified)
    return BuildSummary(
        output=str(output),
        target=target,
        dtype=dtype,
        layers=config.num_layers,
        parameters=sum(config.all_parameter_counts().values()),
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        sizes=engine_sizes(engine),
        referenced_bytes=referenced,
        seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        peak_memory=peak_memory(),
        on_cpu=engine.options.get("on_cpu"),
    )


def run_once(engine_dir: Path, threads: int | None) -> None:
    """Open the finished engine as a user would and run it."""
    import numpy as np

    from engines import load

    session = load(engine_dir, threads=threads)
    state = session.new_state(1)
    session.prefill([[0]], state)
    logits_BN = session.decode([session.vocab_size - 1], state)
    if session.config.vision is not None:
        from mxcompile.vision_building import run_vision_once

        run_vision_once(session)
    if not np.isfinite(logits_BN).all():
        raise EngineError(
            "the built engine computes logits that are not finite; verify the checkpoint (mxcompile checkpoint verify)"
            " or build with --dtype float32",
            exit_code=DISAGREEMENT,
        )


def _sharding_plan(
    config: ModelConfig, tp_size: int, moe_tp_size: int | None, moe_ep_size: int | None, cp_size: int
) -> ShardingPlan:
    """The plan, or the reason why there is none: sizes that do not divide, or no MPI to run what would be built."""
    from export.parallel.mapping import ParallelMapping
    from export.parallel.plan import ShardingPlan

    plan = ShardingPlan(config, ParallelMapping.of(tp_size, moe_tp_size, moe_ep_size, cp_size))
    if len(plan.mapping.ranks) > 1:
        from engines.parallel.launch import find_launcher

        find_launcher()
    return plan


def _check_quantize(quantize: str, quantize_experts: str | None, target: str, device: str) -> None:
    """MxcompileError where a whole model cannot be quantized like this."""
    check_choice("quantize", quantize, WHOLE_QUANTIZATIONS)
    if quantize_experts is not None:
        raise MxcompileError("--quantize is for all large matrices, experts included; leave --quantize-experts out")
    if target != "onnxruntime":
        raise MxcompileError(
            f"--quantize is for the target onnxruntime; the target {target} has --quantize-experts int8, which its plugins run"
        )
    if device != "cpu":
        raise MxcompileError("--quantize is for the CPU; leave --device out")


def _shared_chunk(prefill_chunk: int | None, max_seq_len: int, cp_size: int) -> int:
    """The prefill chunk: unless said, every rank computes as many tokens at a time as one rank alone would.

    Raises MxcompileError when it has fewer tokens than there are ranks to share them.
    """
    from engines.onnxruntime.build import DEFAULT_PREFILL_CHUNK

    chunk = prefill_chunk or DEFAULT_PREFILL_CHUNK * cp_size
    most = min(chunk, max_seq_len)
    if cp_size > most:
        raise MxcompileError(
            f"--cp-size {cp_size}: a prefill chunk has {most} tokens, so some ranks would never get one; "
            f"take --cp-size {most} at most, or a larger --prefill-chunk and --max-seq-len"
        )
    return chunk


def _build_segments(
    engine: EngineConfig,
    model: ir.Model,
    plan: ShardingPlan,
    writer: EngineDirWriter,
    report: StageByName,
    checkpoint: Checkpoint,
    how: dict[str, Any] | None,
) -> EngineConfig:
    """Add the graphs with which ranks share the tokens of a chunk to what the first set of ranks has."""
    from engines.parallel.segments import build_segments
    from export.parallel.context import split_context
    from export.parallel.shard import shard
    from export.parallel.weights import bind_rank_weights

    def quantized(mine: ir.Model, rank: int) -> ir.Model:
        if how is not None:  # for the form of the weights; the first set of ranks has written their numbers
            bind_rank_weights(mine, plan, rank, cast("Source", checkpoint))
            quantize_graph(mine, how)
        return mine

    def graph_of(rank: int) -> ir.Model:
        return quantized(shard(model, plan, rank), rank)

    def segment_of(rank: int) -> ir.Model:
        return quantized(split_context(shard(model, plan, rank), plan, rank), rank)

    return build_segments(engine, graph_of, segment_of, writer, report)


class StageByName:
    """Turns the engine builders' callback (stage, done, total) into stages that follow each other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._name: str | None = None
        self._stack = contextlib.ExitStack()
        self._stage: Stage | None = None
        self._done = 0

    def __enter__(self) -> StageByName:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self._name:
            self._stack.close()
            self._stage = self._stack.enter_context(self._progress.stage(name, total))
            self._name, self._done = name, 0
        assert self._stage is not None
        self._stage.advance(done - self._done)
        self._done = done


def referenced_bytes(model: ir.Model, *, assembled: bool = False) -> int:
    """Bytes of initializers that are used where they lie, as they are or, with `assembled`, put together when the engine is loaded."""
    import onnx_ir as ir

    from export.weights import stored_pieces

    tensors = (value.const_value for value in model.graph.initializers.values())
    if not assembled:
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    stored = (stored_pieces(tensor) or () for tensor in tensors if tensor is not None)
    return sum(piece.nbytes for pieces in stored for piece in pieces if piece.strands)


def engine_sizes(engine: EngineConfig) -> dict[str, int]:
    """Bytes of an engine's files by kind, and in total."""
    sizes = {"graph": 0, "weights": 0, "other": 0}
    for name, record in engine.files.items():
        kind = (
            "graph" if name.endswith((".onnx", ".pieces", ".engine")) else "weights" if ".weights." in name else "other"
        )
        sizes[kind] += record.size
    return sizes | {"total": sum(sizes.values())}


def _versions() -> dict[str, str]:
    import onnxruntime
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_limits(config: ModelConfig, max_batch_size: int, max_seq_len: int, prefill_chunk: int | None) -> None:
    """MxcompileError where the model has fewer positions than asked for, or a limit is not positive."""
    if max_seq_len > config.max_position_embeddings:
        raise MxcompileError(
            f"--max-seq-len {max_seq_len} is more than the {config.max_position_embeddings} positions of this model"
        )
    for name, value in (("batch-size", max_batch_size), ("seq-len", max_seq_len), ("chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise MxcompileError(f"{name} must be at least 1, not {value}")
