"""The sharding plan: every element of every parameter on exactly the ranks that should hold it; sizes refused with a way out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ExportError
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan, rule_of
from model_defs.presets import preset

TEXT_01_PARAMETERS = 456_089_655_296


@pytest.mark.parametrize("mapping", [(8, 1, 8), (8, 8, 1), (8, 2, 4), (16, 2, 8), (4, 4, 1), (1, 1, 1)])
def test_text_01_adds_up_exactly(mapping: tuple[int, int, int]) -> None:
    plan = ShardingPlan(preset("text-01"), ParallelMapping(*mapping))
    distinct = 0
    for name in plan.shapes:
        held = sum(plan.part(name, rank).size for rank in plan.mapping.ranks)
        assert held % plan.copies(name) == 0
        distinct += held // plan.copies(name)
    assert distinct == TEXT_01_PARAMETERS


def test_text_01_on_eight_ranks() -> None:
    plan = ShardingPlan(preset("text-01"), ParallelMapping.of(8, moe_ep_size=8))
    assert plan.part("layers.0.self_attn.qkv_proj.weight", 3).ranges == ((9216, 12288), (0, 6144))  # 3072 rows: 8 heads
    assert plan.part("layers.0.block_sparse_moe.fc1.weight", 5).ranges == ((20, 24), (0, 18432), (0, 6144))
    assert plan.part("layers.7.self_attn.k_proj.weight", 7).ranges == ((896, 1024), (0, 6144))
    assert plan.state_elements_per_sequence() * 4 == 35 * 2**20
    assert plan.cache_elements_per_token() * 2 == 5120
    assert sum(item.count for item in plan.collectives()) == 1 + 70 + 80 + 80 + 1


def test_expert_index_moves_fastest() -> None:
    mapping = ParallelMapping(8, 2, 4)
    assert [(mapping.moe_tp_rank(rank), mapping.moe_ep_rank(rank)) for rank in mapping.ranks] == [
        (tp, ep) for tp in range(2) for ep in range(4)
    ]


def test_more_ranks_than_kv_heads_share_them() -> None:
    plan = ShardingPlan(preset("text-01"), ParallelMapping.of(32))
    parts = [plan.part("layers.7.self_attn.v_proj.weight", rank).ranges[0] for rank in range(32)]
    assert parts == [(128 * (rank // 4), 128 * (rank // 4) + 128) for rank in range(32)]
    # Rank 6 holds query heads 12 and 13, which kv head 1 serves (heads 8 to 15).
    assert plan.part("layers.7.self_attn.q_proj.weight", 6).ranges[0] == (12 * 128, 14 * 128)


@st.composite
def cases(draw: st.DrawFn) -> ShardingPlan:
    moe_tp, moe_ep = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3, 4]))
    tp = moe_tp * moe_ep
    kv_heads = draw(st.sampled_from([n for n in range(1, 25) if tp % n == 0 or n % tp == 0]))
    heads = np.lcm(kv_heads, tp) * draw(st.integers(1, 3))
    config = dataclasses.replace(
        preset("tiny"),
        num_attention_heads=int(heads),
        num_key_value_heads=kv_heads,
        head_dim=4,
        rotary_dim=2,
        hidden_size=draw(st.integers(1, 9)),
        num_local_experts=moe_ep * draw(st.integers(2, 3)),
        intermediate_size=moe_tp * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 5 * tp)),
        layer_kinds=("lightning", "softmax"),
    )
    return ShardingPlan(config, ParallelMapping(tp, moe_tp, moe_ep))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_element_is_held_by_as_many_ranks_as_the_plan_says(plan: ShardingPlan) -> None:
    for name, shape in plan.shapes.items():
        holders = np.zeros(shape, dtype=int)
        for rank in plan.mapping.ranks:
            holders[plan.part(name, rank).slices] += 1
        assert (holders == plan.copies(name)).all(), name
    total = sum(plan.config.parameter_counts().values())
    assert sum(int(np.prod(shape)) for shape in plan.shapes.values()) == total


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3,), ["64 attention heads", "2 and 4"]),
        ((128,), ["64 attention heads", "64"]),
        ((8, None, 3), ["moe_ep_size 3 does not divide tp_size 8", "2 and 4"]),
        ((64, None, 64), ["32 experts", "32"]),
        ((8, 2, 2), ["is 4, but must be tp_size (8)"]),
        ((0,), ["positive whole number"]),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest_possible(sizes: tuple, words: list[str]) -> None:
    with pytest.raises(ExportError) as caught:
        ShardingPlan(preset("text-01"), ParallelMapping.of(*sizes))
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "tp_size", "words"),
    [
        ({"num_key_value_heads": 4, "num_attention_heads": 12}, 6, ["key/value heads", "4 and 12"]),
        ({"intermediate_size": 126}, 4, ["inner width of 126", "2"]),
    ],
)
def test_sizes_of_the_model_are_refused_too(change: dict[str, int], tp_size: int, words: list[str]) -> None:
    config = dataclasses.replace(preset("tiny"), **({"vocab_size": 480} | change))
    with pytest.raises(ExportError) as caught:
        ShardingPlan(config, ParallelMapping.of(tp_size))
    for word in words:
        assert word in str(caught.value)


def test_a_parameter_without_a_rule_is_an_error() -> None:
    with pytest.raises(ExportError, match="no sharding rule"):
        rule_of("layers.0.shared_mlp.weight")
