"""Engines of several ranks for tests, all from one trace and one checkpoint in a folder."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

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
from export.quantize import QuantizationError
from export.trace import trace_model
from export.weights import bind_weights
from model_defs.checkpoint.reader import Checkpoint
from model_defs.config import ModelConfig
from mxcompile.checkpoints import create_checkpoint
from mxcompile.quantized import described, quantize

LIMIT = 320  # tokens of a sequence


class Workshop:
    """Builds engines of one checkpoint; each mapping once, and once for each way of quantizing."""

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

    def engine(self, *sizes: int, how: dict[str, Any] | None = None) -> Path:
        """Folder of the engine for tp, moe_tp, moe_ep and cp sizes. `how`: what is quantized, as `mxcompile.quantized` says it."""
        kind = "" if how is None else "-".join(*how.items())
        path = self.folder / ("engine" + "-".join([*map(str, sizes), kind]))
        if path.exists():
            return path
        mapping = ParallelMapping(*sizes)
        request = BuildRequest(
            model=self.config.to_dict(),
            max_batch_size=4,
            max_seq_len=LIMIT,
            mapping=Mapping(*sizes),
            quantization=how,
            checkpoint=Reference(str(self.checkpoint.folder), self.checkpoint.fingerprint()),
            taps=["taps.0.hidden", f"taps.{self.config.num_layers - 1}.router_logits"],
        )
        errors: list[QuantizationError] = []

        def quantized(model: ir.Model) -> ir.Model:
            if how is not None:
                errors.append(quantize(model, how))
            return model

        with EngineDirWriter(path) as writer:
            if len(mapping.ranks) == 1:
                model = self.trace.clone()
                bind_weights(model, self.config, self.checkpoint)
                engine = build(quantized(model), writer, request)
            else:
                plan = ShardingPlan(self.config, mapping)

                def graph_of(rank: int) -> ir.Model:
                    mine = shard(self.trace, plan, rank)
                    bind_rank_weights(mine, plan, rank, self.checkpoint)
                    return quantized(mine)

                engine = build_ranks(graph_of, writer, request)
                if mapping.cp_size > 1:

                    def segment_of(rank: int) -> ir.Model:
                        mine = split_context(shard(self.trace, plan, rank), plan, rank)
                        bind_rank_weights(mine, plan, rank, self.checkpoint)
                        return quantized(mine)

                    engine = build_segments(engine, graph_of, segment_of, writer)
            if how is not None:
                engine = replace(engine, quantization=described(how, sum(errors, QuantizationError())))
            writer.commit(engine)
        return path
