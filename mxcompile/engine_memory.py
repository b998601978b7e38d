"""What an engine takes of memory when it is loaded, by rank: from its files and configuration, and what TensorRT said of the plan.

On a GPU a TensorRT session makes one execution context per optimization profile, and each reserves the larger of the two activation sizes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np

from engines.config import EngineConfig, Port, RankFiles, VisionHalf
from engines.parallel.heads import of_rank
from engines.weights import Manifest

PROFILES = ("decode", "prefill")


def memory_of(folder: Path, config: EngineConfig) -> list[dict[str, Any]]:
    """Bytes per rank. "activations" by profile, with the scratch of plugins and kernels in them, and "total" are of TensorRT engines only:
    ONNX Runtime takes activations as it needs them. States are those of a full batch at the engine's limits.
    """
    found = [_of_rank(folder, config, files, index) for index, files in enumerate(config.ranks)]
    if config.vision is not None:
        found[0]["vision weights, from the first image on"] = _listed(folder, config.vision)
    return found


def _of_rank(folder: Path, config: EngineConfig, files: RankFiles, index: int) -> dict[str, Any]:
    limits = config.limits
    capacity = int(config.options.get("capacity", limits.max_seq_len))
    mine = of_rank(config, files.rank) if config.mapping.tp_size > 1 else config
    states = {"recurrent": 0, "cache": 0}
    for spec in mine.states:
        dims = [dim if isinstance(dim, int) else capacity for dim in spec.dims[1:]]
        kind = "recurrent" if spec.role == "recurrent_state" else "cache"
        states[kind] += limits.max_batch_size * math.prod(dims) * np.dtype(spec.dtype).itemsize
    found: dict[str, Any] = {
        "rank": files.rank,
        "weights": _listed(folder, files),
        "recurrent states": states["recurrent"],
        "key/value cache": states["cache"],
    }
    if not config.target.startswith("tensorrt"):
        return found
    told = _told(config, index)
    found["weights in the plan"] = told.get("weights")
    found["inputs and outputs"] = _ports(config)
    activations = told.get("activations") or []
    if len(activations) == len(PROFILES):
        found["activations"] = dict(zip(PROFILES, activations, strict=True))
        fixed = sum(value for name, value in found.items() if name != "rank" and isinstance(value, int))
        found["total"] = fixed + len(PROFILES) * max(activations)
    return found


def _told(config: EngineConfig, index: int) -> dict[str, Any]:
    """What TensorRT's builder said of a rank's plan; nothing where the engine is older or the file was edited."""
    told = config.options.get("memory")
    one = told[index] if isinstance(told, list) and index < len(told) else None
    return one if isinstance(one, dict) else {}


def _listed(folder: Path, files: RankFiles | VisionHalf) -> int:
    """Bytes of the weights outside the graph."""
    if files.weights is None:
        return 0
    path = folder / files.weights
    return sum(record.nbytes for record in Manifest.from_json(path.read_text(encoding="utf-8"), str(path)).tensors)


def _ports(config: EngineConfig) -> int:
    """Buffers for tokens, logits and taps of the largest step."""
    limits, positions = config.limits, int(config.options.get("max_positions", 1))
    sizes = {"batch": limits.max_batch_size, "tokens": limits.prefill_chunk, "positions": positions}

    def size(port: Port) -> int:
        dims = [dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in port.dims]
        return math.prod(dims) * np.dtype(port.dtype).itemsize

    states = {name for spec in config.states for name in (spec.past, spec.present)}
    return sum(size(port) for port in (*config.inputs, *config.outputs) if port.name not in states)
