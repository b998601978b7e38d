"""Context parallelism in the canonical graph: the segments of all ranks together against the PyTorch definition."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lockstep import Ranks
from test_shard import TOLERANCE, quiet_trace, random_model, small_config

from export.errors import ExportError
from export.parallel.collective import register_schema
from export.parallel.context import split_context
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.verify import verify_with_onnx

CONFIG = small_config(num_attention_heads=4, num_key_value_heads=2)
CAPACITY, BATCH = 40, 2


@cache
def trace() -> ir.Model:
    return quiet_trace(CONFIG)


@cache
def ranks_of(mapping: ParallelMapping) -> Ranks:
    return Ranks(trace(), random_model(CONFIG), ShardingPlan(CONFIG, mapping))


def walk(mapping: ParallelMapping, steps: list[list[int]], seed: int) -> None:
    """Ragged steps one after the other: after each, logits of all tokens and all states, on every rank."""
    ranks, model = ranks_of(mapping), random_model(CONFIG)
    random = np.random.default_rng(seed)
    whole, parts, past = model.new_states(BATCH, CAPACITY), ranks.new_states(CAPACITY, BATCH), np.zeros(BATCH, np.int64)
    for new in steps:
        tokens = -(-max(*new, 1) // mapping.cp_size) * mapping.cp_size
        feeds = {
            "input_ids": random.integers(0, CONFIG.vocab_size, (BATCH, tokens)),
            "new_lengths": np.asarray(new),
            "past_lengths": past,
            "logit_positions": np.tile(np.arange(tokens), (BATCH, 1)),
        }
        with torch.no_grad():
            logits, whole, _ = model(*map(torch.from_numpy, feeds.values()), whole)
        before, results = parts, ranks.run(feeds, parts)
        valid = np.arange(tokens) < np.asarray(new)[:, None]
        parts = [dict(zip(mine, result[1:], strict=True)) for mine, result in zip(parts, results, strict=True)]
        for rank, result in enumerate(results):
            assert np.abs(result[0] - logits.numpy())[valid].max(initial=0) < TOLERANCE
            for (name, mine), state in zip(parts[rank].items(), whole, strict=True):
                first = mapping.tp_rank(rank) * (state.shape[1] // mapping.tp_size)
                assert np.abs(mine - state.numpy()[:, first : first + mine.shape[1]]).max() < TOLERANCE, name
                assert np.array_equal(mine, parts[mapping.tp_rank(rank)][name]), (
                    "ranks hold the same states, bit for bit"
                )
                if name.endswith("recurrent_state"):
                    idle = np.asarray(new) == 0
                    assert np.array_equal(mine[idle], before[rank][name][idle]), "an idle row keeps its state"
        past = past + new


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (1, 1, 1, 3), (2, 1, 2, 2)])
def test_segments_together_equal_pytorch(sizes: tuple[int, int, int, int]) -> None:
    walk(ParallelMapping(*sizes), [[5, 3], [2, 0], [1, 1], [8, 7]], seed=1)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.lists(st.integers(0, 9), min_size=BATCH, max_size=BATCH), min_size=1, max_size=3), st.integers(0, 9))
@example([[0, 0], [3, 0], [1, 9], [4, 8]], 0)  # no tokens at all; fewer than ranks; segments of one row that are empty
def test_any_lengths_over_four_ranks(steps: list[list[int]], seed: int) -> None:
    walk(ParallelMapping(cp_size=4), steps, seed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rank_graphs_are_valid_onnx_and_keep_the_contract(dtype: str) -> None:
    register_schema()
    whole, plan = quiet_trace(CONFIG, dtype), ShardingPlan(CONFIG, ParallelMapping(cp_size=2))
    before = ir.to_proto(whole).SerializeToString(deterministic=True)
    graphs = [split_context(whole, plan, rank) for rank in plan.mapping.ranks]
    for mine in graphs:
        verify_with_onnx(mine)
        for ours, theirs in ((mine.graph.inputs, whole.graph.inputs), (mine.graph.outputs, whole.graph.outputs)):
            assert [(v.name, str(v.shape), v.dtype) for v in ours] == [(v.name, str(v.shape), v.dtype) for v in theirs]
    forms = [[(node.op_type, node.name, [str(v.shape) for v in node.outputs]) for node in g.graph] for g in graphs]
    assert forms[0] == forms[1]
    assert ir.to_proto(whole).SerializeToString(deterministic=True) == before  # the trace is left as it was


def test_groups_of_ranks_both_ways() -> None:
    mapping = ParallelMapping(2, 1, 2, cp_size=3)
    assert [mapping.tp_group(rank) for rank in mapping.ranks] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2
    assert [mapping.cp_group(rank) for rank in mapping.ranks] == [(0, 2, 4), (1, 3, 5)] * 3
    plan = ShardingPlan(CONFIG, mapping)
    mine = split_context(shard(trace(), plan, 3), plan, 3)
    groups = {tuple(n.attributes["groups"].as_ints()) for n in mine.graph if n.op_type == "DistCollective"}
    assert groups == {(2, 3), (1, 3, 5)}
    assert ParallelMapping(2, 1, 2).tp_group(1) == ParallelMapping(cp_size=2).cp_group(1) == ()  # all ranks: no list


def test_a_graph_put_together_otherwise_is_refused() -> None:
    changed, plan = trace().clone(), ShardingPlan(CONFIG, ParallelMapping(cp_size=2))
    next(node for node in changed.graph if node.op_type == "GatherElements").op_type = "GatherND"
    with pytest.raises(ExportError, match="expected the one that chooses the rows"):
        split_context(changed, plan, 0)
    with pytest.raises(ExportError, match="cp_size must be a positive whole number, not 0"):
        ParallelMapping(cp_size=0)
