"""Engines of several ranks for tests, all from one trace and one checkpoint in a folder."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from engines.config import Checkpoint as Reference
from engines.config import Mapping
from engines.directory import EngineDirWriter
from engines.onnxruntime.build import BuildRequest, build
from engines.parallel.build import build_ranks
from engines.parallel.segments import build_segments
from export.parallel.context import split_context
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.parallel.weights import bind_rank_weights
from export.trace import trace_model
from export.weights import bind_weights
from model_defs.checkpoint.reader import Checkpoint
from model_defs.config import ModelConfig
from mxcompile.checkpoints import create_checkpoint

LIMIT = 320  # tokens of a sequence


class Workshop:
    """Builds engines of one checkpoint; each mapping once."""

    def __init__(self, folder: Path, preset: str | ModelConfig = "tiny", seed: int = 0, dtype: str = "float32") -> None:
        self.folder = folder
        create_checkpoint(preset, folder / "checkpoint", seed=seed, dtype=dtype)
        self.checkpoint = Checkpoint.open(folder / "checkpoint")

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @cached_property
    def trace(self) -> ir.Model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trace_model(self.config)

    def engine(self, *sizes: int) -> Path:
        """Folder of the engine for tp, moe_tp, moe_ep and cp sizes."""
        path = self.folder / ("engine" + "-".join(map(str, sizes)))
        if path.exists():
            return path
        mapping = ParallelMapping(*sizes)
        request = BuildRequest(
            model=self.config.to_dict(),
            max_batch_size=4,
            max_seq_len=LIMIT,
            mapping=Mapping(*sizes),
            checkpoint=Reference(str(self.checkpoint.folder), self.checkpoint.fingerprint()),
            taps=["taps.0.hidden", f"taps.{self.config.num_layers - 1}.router_logits"],
        )
        with EngineDirWriter(path) as writer:
            if len(mapping.ranks) == 1:
                model = self.trace.clone()
                bind_weights(model, self.config, self.checkpoint)
                writer.commit(build(model, writer, request))
            else:
                plan = ShardingPlan(self.config, mapping)

                def graph_of(rank: int) -> ir.Model:
                    mine = shard(self.trace, plan, rank)
                    bind_rank_weights(mine, plan, rank, self.checkpoint)
                    return mine

                engine = build_ranks(graph_of, writer, request)
                if mapping.cp_size > 1:

                    def segment_of(rank: int) -> ir.Model:
                        return split_context(shard(self.trace, plan, rank), plan, rank)

                    engine = build_segments(engine, lambda rank: shard(self.trace, plan, rank), segment_of, writer)
                writer.commit(engine)
        return path
