"""A small engine: bytes of plain weights stay in a checkpoint, experts are derived."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import small_graph

from engines.config import Checkpoint
from engines.directory import EngineDirWriter
from engines.onnxruntime.build import BuildRequest, build

MAX_SEQ_LEN = 400


@dataclass(frozen=True)
class SmallEngine:
    path: Path
    checkpoint: Path
    weights: dict[str, np.ndarray]


def build_small(root: Path, name: str = "engine", **changes: object) -> SmallEngine:
    """Builds it in `root`; `changes` to the request."""
    weights = small_graph.random_weights()
    checkpoint = root / "checkpoint"
    request = {
        "model": {"kind": "small"},
        "max_batch_size": 6,
        "max_seq_len": MAX_SEQ_LEN,
        "prefill_chunk": 32,
        "checkpoint": Checkpoint(str(checkpoint), "fingerprint"),
        "taps": small_graph.TAPS,
    } | changes
    model = small_graph.model(weights, checkpoint)
    with EngineDirWriter(root / name) as writer:
        writer.commit(build(model, writer, BuildRequest(**request)))  # type: ignore[arg-type]
    return SmallEngine(root / name, checkpoint, weights)
