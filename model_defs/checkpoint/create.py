"""Writes checkpoints with random weights, in the layout of the published ones.

They stand in for the real 912 GB in tests, demonstrations and measurements: same names, same files, same configuration
schemas. `random_weights` says why their numerics are like a trained model's.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from numpy.typing import NDArray

from model_defs.checkpoint.names import expected_tensors
from model_defs.checkpoint.processor import PREPROCESSOR_FILE, PUBLISHED_PROCESSING, processor_to_json
from model_defs.checkpoint.random_tokenizer import write_tokenizer
from model_defs.checkpoint.random_weights import random_blocks
from model_defs.checkpoint.reader import CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, Checkpoint
from model_defs.checkpoint.safetensors_writer import PlannedTensor, plan_shards, shard_names, write_safetensors
from model_defs.config import ModelConfig
from model_defs.config_schemas import Schema, config_for_schema, config_to_schema
from model_defs.errors import CheckpointError, StorageError

WeightType = Literal["bfloat16", "float16", "float32"]
OnProgress = Callable[[int, int, str], None]  # bytes done, bytes in all, tensor just written

_LARGEST_SHARD = 4 << 30
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SLACK = 32 << 20  # bytes for headers, index and tokenizer in the check for free space


def create_checkpoint(
    config: ModelConfig,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: WeightType = "bfloat16",
    max_shard_bytes: int | None = None,
    with_tokenizer: bool = True,
    schema: Schema | None = None,
    hollow: bool = False,
    on_progress: OnProgress | None = None,
) -> Checkpoint:
    """Writes a checkpoint of `config` with random weights to the new folder `folder` and opens it.

    Args:
        seed: whole number >= 0; equal seeds give equal weights whatever the schema and the sharding.
        max_shard_bytes: largest sum of tensors per file. By default 4 GiB, or a quarter of the weights where that is
        less, so that
            even small checkpoints have shards and an index.
        schema: how config.json is written; "vl-01" prefixes the tensors, and only there a vision half can be. Default: "vl-01" for a
            model with a vision half, "original" for others.
        hollow: no weights: holes of their size, which read as zeros. What looks at names, shapes and sizes only can then be tried at
            full size.

    The folder appears only when it is whole: everything is written to a sibling, which is removed on any failure.

    Raises:
        CheckpointError: the folder exists and is not empty, or an argument cannot be used.
        ConfigError: `config` cannot be written in `schema`.
        StorageError: the disk is full or cannot be written.
    """
    target = Path(folder).absolute()
    if dtype not in get_args(WeightType):
        raise CheckpointError(f"unknown dtype {dtype!r}; known: {', '.join(get_args(WeightType))}")
    if not isinstance(seed, int) or seed < 0:
        raise CheckpointError(f"seed must be a whole number of at least 0, not {seed!r}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists; choose another folder or remove it first")
    schema = schema or ("original" if config.vision is None else "vl-01")
    config_text = json.dumps(config_to_schema(config, schema, dtype=dtype), indent=2) + "\n"
    config = config_for_schema(config, schema)
    tensors = [
        PlannedTensor(name, _SAFETENSORS_NAMES[dtype], shape) for name, shape in expected_tensors(config).items()
    ]
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_space(target.parent, 0 if hollow else sum(tensor.nbytes for tensor in tensors))
        partial.mkdir()
        try:
            (partial / CONFIG_FILE).write_text(config_text, encoding="utf-8")
            _write_generation_config(config, partial)
            if config.vision is not None:
                text = json.dumps(processor_to_json(PUBLISHED_PROCESSING, config.vision), indent=2) + "\n"
                (partial / PREPROCESSOR_FILE).write_text(text, encoding="utf-8")
            if with_tokenizer:
                write_tokenizer(config, partial)
            values = None if hollow else _random(config, seed, dtype)
            _write_weights(tensors, partial, values, max_shard_bytes, on_progress)
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except BaseException:  # Ctrl-C too: nothing half-written may stay
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{target}: the disk is full; nothing was kept") from None
        raise StorageError(f"{target}: cannot be written ({os.strerror(error.errno or 0)})") from None
    return Checkpoint.open(target)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SLACK:
        unit, size = ("GB", 1e9) if needed >= 1e9 else ("MB", 1e6)
        raise StorageError(
            f"{folder}: {(needed + _SLACK) / size:.1f} {unit} are needed, {free / size:.1f} {unit} are free"
        )


def _write_generation_config(config: ModelConfig, folder: Path) -> None:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    known = {key: value for key, value in ids.items() if value is not None}
    (folder / GENERATION_CONFIG_FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _random(config: ModelConfig, seed: int, dtype: WeightType) -> Callable[[PlannedTensor], Iterator[NDArray]]:
    return lambda tensor: random_blocks(config, tensor.name, tensor.shape, seed=seed, dtype=dtype)


def _write_weights(
    tensors: list[PlannedTensor],
    folder: Path,
    values: Callable[[PlannedTensor], Iterator[NDArray]] | None,
    max_shard_bytes: int | None,
    on_progress: OnProgress | None,
) -> None:
    total = sum(tensor.nbytes for tensor in tensors)
    # Shards fill up to the limit minus what the next tensor does not fit: a quarter of the total gives four or five.
    shards = plan_shards(tensors, max_shard_bytes or min(_LARGEST_SHARD, -(-total // 4)))
    names = shard_names(len(shards))
    done = 0

    def count(tensor: PlannedTensor) -> None:
        nonlocal done
        done += tensor.nbytes
        if on_progress:
            on_progress(done, total, tensor.name)

    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, values, count)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
