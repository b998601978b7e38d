"""Open a TensorRT engine directory: every check that needs no GPU first, then the plan itself. Loading a plan has never run on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from engines.config import EngineConfig
from engines.directory import read_config, verify_files
from engines.errors import ENVIRONMENT, EngineError
from engines.interface import Session
from engines.parallel.heads import of_rank
from engines.tensorrt.device import CudaDevice, compute_capability
from engines.tensorrt.messages import failure, make_logger, started
from engines.tensorrt.nccl import Communicator, load_nccl
from engines.tensorrt.session import TrtSession
from engines.weights import open_weights

Verify = Literal["quick", "full"]


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    verify: Verify = "quick",
    checkpoint: str | os.PathLike[str] | None = None,
    plugin_folder: Path | None = None,
) -> Session:
    """Open an engine directory on the first GPU, or on as many as it has ranks.

    Args:
        threads: taken for the sake of other targets' callers; a GPU has no use for it.
        verify: "quick" checks files above 64 MiB by size and samples, "full" reads every byte.
        checkpoint: where the checkpoint lies now, for an engine without weights inside.
        plugin_folder: of the plugin library; default: where `mxcompile plugins build` puts it.

    Raises EngineError: not an engine, damaged; with exit code 3: no GPU or another one than the engine is for, TensorRT missing or of
    another version, plugin library missing or of another architecture, too little GPU memory.
    """
    folder = Path(path)
    config = read_config(folder)
    if config.target not in ("tensorrt", "tensorrt-rtx"):
        raise EngineError(f"{folder}: built for {config.target}, not for TensorRT")
    verify_files(folder, config, whole=verify == "full")
    for rank in range(config.mapping.tp_size):
        check_gpu(config, compute_capability(rank))
    if config.mapping.tp_size > 1:
        load_nccl()
        from engines.parallel.session import load as load_ranks

        return load_ranks(path, threads=threads, checkpoint=checkpoint)
    moved = Path(checkpoint) if checkpoint is not None else None
    return open_rank(folder, config, moved=moved, whole=verify == "full", plugin_folder=plugin_folder)


def open_rank(
    folder: Path,
    config: EngineConfig,
    *,
    exchanger: RankExchanger | None = None,
    moved: Path | None = None,
    whole: bool = False,
    plugin_folder: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> TrtSession:
    """The session of one rank in this process, on the GPU of its number; the files of the directory are checked already.

    Args:
        exchanger: which rank this is, and its way to the others; default: the only one.
        moved: where the checkpoint lies now.
        tick: called whenever there is progress.
    """
    rank = 0 if exchanger is None else exchanger.rank
    trt = _modules(config, plugin_folder)
    files = next(files for files in config.ranks if files.rank == rank)
    weights = [] if files.weights is None else open_weights(folder, config, files.weights, moved, whole=whole)[1]
    device = CudaDevice(rank)
    communicator = None
    if exchanger is not None:
        communicator = Communicator(rank, exchanger.ranks, exchanger.share)
        config = of_rank(config, rank)
    engine = open_plan(trt, folder / files.graph)
    return TrtSession(config, device, engine, weights, communicator, tick)


class RankExchanger(Protocol):
    """Which rank a process is; `share` hands rank 0's bytes to every rank."""

    rank: int
    ranks: int

    def share(self, content: bytes) -> bytes: ...


def check_gpu(config: EngineConfig, found: int | str) -> None:
    """`found`: as `compute_capability` gives it. EngineError (exit code 3) where the engine cannot run there."""
    wanted, name = int(config.options.get("compute_capability", 0)), config.options.get("gpu", "unknown")
    ranks = config.mapping.tp_size
    gpus = "an NVIDIA GPU" if ranks == 1 else f"{ranks} NVIDIA GPUs"
    need = f"this engine needs {gpus} of compute capability {wanted / 10:.1f} (built for {name})"
    if isinstance(found, str):
        raise EngineError(f"{need}; here is {found}", exit_code=ENVIRONMENT)
    if found != wanted:
        raise EngineError(
            f"{need}; here is one of {found / 10:.1f}: build the engine again with the --gpu that goes with it",
            exit_code=ENVIRONMENT,
        )


def check_version(config: EngineConfig, found: str) -> None:
    """A plan loads in the TensorRT that built it. EngineError (exit code 3) for another version."""
    built = config.versions.get(config.target, "unknown")
    if built != found:
        raise EngineError(
            f"this engine was built with {config.target} {built}, here is {found}; install that version or rebuild the engine",
            exit_code=ENVIRONMENT,
        )


def _modules(config: EngineConfig, plugin_folder: Path | None) -> Any:
    """TensorRT's Python module, with the plugins registered."""
    from plugins.errors import PluginsError
    from plugins.library import load as load_kernels
    from plugins.tensorrt_runtime import load_plugins, load_tensorrt

    try:
        trt = load_tensorrt(config.target)
        check_version(config, str(trt.__version__))
        loaded = load_plugins(trt, plugin_folder)
        kernels = load_kernels(loaded.path.parent)
    except PluginsError as error:
        raise EngineError(str(error), exit_code=ENVIRONMENT) from error
    check_architectures(config, kernels.architectures, kernels.architecture_runs)
    return trt


def check_architectures(config: EngineConfig, present: tuple[str, ...], runs: Any) -> None:
    """EngineError (exit code 3) where the plugin library has no code for the engine's GPU."""
    wanted = int(config.options.get("compute_capability", 0))
    if not runs(wanted):
        from plugins.catalog import architecture_for

        raise EngineError(
            f"the plugin library holds code for {', '.join(present)}, which does not run on compute capability {wanted / 10:.1f}; "
            f"run `mxcompile plugins build --arch {architecture_for(wanted) or wanted}`",
            exit_code=ENVIRONMENT,
        )


def open_plan(trt: Any, file: Path) -> Any:
    """The engine of a plan file. EngineError with TensorRT's reason where it does not take it."""
    logger = make_logger(trt)
    runtime = started(trt.Runtime, "runtime", logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise failure(f"reading {file}", logger)
    return engine
