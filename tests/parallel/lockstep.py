"""Runs the graphs of all ranks side by side in onnx's reference evaluator: one thread per rank, collectives as a meeting point."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from export.parallel.context import split_context
from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.parallel.weights import bind_rank_weights
from model_defs.text_model import TextModel
from model_defs.weights import Direct, Stacked, weight_recipes


class MoE(OpRun):  # the evaluator finds it by this name
    """com.microsoft::MoE with a range of local experts, token by token; written apart from every other implementation."""

    op_domain = "com.microsoft"

    def _run(self, x, router, fc1, _bias1, fc2, _bias2=None, k=None, first_local_expert=None, **_attributes):  # type: ignore[no-untyped-def]
        tokens, first = x.reshape(-1, x.shape[-1]), first_local_expert or 0
        out = np.zeros_like(tokens)
        for n, (token, logits) in enumerate(zip(tokens, router, strict=True)):
            chosen = np.argsort(-logits, kind="stable")[:k]
            weights = np.exp(logits[chosen] - logits[chosen].max())
            for expert, weight in zip(chosen - first, weights / weights.sum(), strict=True):
                if 0 <= expert < len(fc1):
                    gate, up = fc1[expert][0::2] @ token, fc1[expert][1::2] @ token
                    out[n] += weight * (fc2[expert] @ (gate / (1 + np.exp(-gate)) * up))
        return (out.reshape(x.shape),)


class _Meeting:
    """Where ranks leave their values and pick up everybody's."""

    current = threading.local()

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=300)  # seconds; a hang, on however slow a machine
        self.values: list[Any] = [None] * ranks

    def exchange(self, rank: int, value: np.ndarray) -> list[np.ndarray]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class DistCollective(OpRun):
    op_domain = ""

    def _run(self, x, collective_operation=None, reduce_op=None, root=None, nb_rank=None, groups=None, group_size=None):  # type: ignore[no-untyped-def]
        meeting, rank = _Meeting.current.here
        values = meeting.exchange(rank, x)
        if groups is not None:
            assert rank in groups
            assert len(groups) == group_size
            values = [values[other] for other in groups]
        assert len(values) == nb_rank
        assert root == -1
        if collective_operation == "all_gather":
            assert reduce_op == "none"
            return (np.concatenate(values, axis=0),)
        assert (collective_operation, reduce_op) == ("all_reduce", "sum")
        total = values[0].copy()
        for value in values[1:]:
            total = total + value
        return (total,)


class MemorySource:
    """A checkpoint in memory, filled from a model's parameters; counts what is read of it."""

    def __init__(self, model: TextModel) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        parameters = dict(model.named_parameters())
        for name, recipe in weight_recipes(model.config).items():
            value = parameters[name].data.numpy()
            if isinstance(recipe, Direct):
                self.arrays[recipe.tensor] = value
            elif isinstance(recipe, Stacked):
                self.arrays |= dict(zip(recipe.tensors, value, strict=True))
            else:
                self.arrays |= dict(zip(recipe.even, value[:, 0::2], strict=True))
                self.arrays |= dict(zip(recipe.odd, value[:, 1::2], strict=True))

    @property
    def entries(self) -> dict[str, Any]:
        return {name: _Entry(array) for name, array in self.arrays.items()}

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]


class _Entry:
    file, offset, dtype = "memory", 0, "not a stored type"  # so that every tensor is made, not referred to

    def __init__(self, array: np.ndarray) -> None:
        self.shape, self.nbytes = array.shape, array.nbytes


class Ranks:
    """All ranks of one model."""

    def __init__(self, graph: ir.Model, model: TextModel, plan: ShardingPlan) -> None:
        self.plan, self.evaluators = plan, []
        source = MemorySource(model)
        for rank in plan.mapping.ranks:
            mine = split_context(shard(graph, plan, rank), plan, rank)
            bind_rank_weights(mine, plan, rank, source)
            self.evaluators.append(ReferenceEvaluator(ir.to_proto(mine), new_ops=[MoE, DistCollective]))

    def new_states(self, capacity: int, batch: int) -> list[dict[str, np.ndarray]]:
        sizes = {"batch": batch, "capacity": capacity}
        return [
            {
                name: np.zeros([dim if isinstance(dim, int) else sizes[dim] for dim in dims], np.float32)
                for name, dims in self.plan.state_dims(rank).items()
            }
            for rank in self.plan.mapping.ranks
        ]

    def run(self, feeds: dict[str, np.ndarray], states: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """Outputs of every rank."""
        meeting = _Meeting(len(self.evaluators))

        def one(rank: int) -> list[np.ndarray]:
            _Meeting.current.here = (meeting, rank)
            try:
                return self.evaluators[rank].run(None, feeds | states[rank])
            except BaseException:
                meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.evaluators)) as pool:
            return list(pool.map(one, range(len(self.evaluators))))
