"""The graphs of all ranks together against the PyTorch definition, over random sizes; weights as slices of a checkpoint."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import Ranks
from random_text_model import random_model

from export.errors import ExportError
from export.parallel.collective import register_schema
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.parallel.weights import bind_rank_weights
from export.trace import trace_model
from export.verify import verify_with_onnx
from model_defs.config import ModelConfig
from model_defs.presets import preset

# As for one rank against PyTorch: fp32 on both sides, sums in another order, logits of scale 4.
TOLERANCE = 5e-5


def small_config(**changes: object) -> ModelConfig:
    sizes = dict(
        hidden_size=24,
        head_dim=8,
        rotary_dim=4,
        intermediate_size=12,
        vocab_size=48,
        num_attention_heads=8,
        layer_kinds=("lightning", "softmax", "lightning"),
    )
    return dataclasses.replace(preset("tiny"), **(sizes | changes))


def quiet_trace(config: ModelConfig, dtype: str = "float32") -> ir.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace_model(config, dtype)


def check_against_pytorch(config: ModelConfig, mapping: ParallelMapping) -> None:
    """Ragged prefill, then a ragged continuation with an idle row: logits on every rank and all states."""
    model, plan = random_model(config), ShardingPlan(config, mapping)
    ranks = Ranks(quiet_trace(config), model, plan)
    random, batch, capacity = np.random.default_rng(1), 2, 12
    whole, parts, past = model.new_states(batch, capacity), ranks.new_states(capacity, batch), np.zeros(2, np.int64)
    for new in ([5, 3], [2, 0], [1, 1]):
        tokens = max(new)
        feeds = {
            "input_ids": random.integers(0, config.vocab_size, (batch, tokens)),
            "new_lengths": np.asarray(new),
            "past_lengths": past,
            "logit_positions": np.tile(np.arange(tokens), (batch, 1)),
        }
        with torch.no_grad():
            logits, whole, _ = model(*map(torch.from_numpy, feeds.values()), whole)
        results = ranks.run(feeds, parts)
        valid = np.arange(tokens) < np.asarray(new)[:, None]
        for rank, result in enumerate(results):
            assert np.abs(result[0] - logits.numpy())[valid].max() < TOLERANCE
            names = list(parts[rank])
            parts[rank] = dict(zip(names, result[1:], strict=True))
            for name, state, mine in zip(names, whole, result[1:], strict=True):
                heads = state.shape[1] // mine.shape[1]  # pieces
                piece = rank * heads // mapping.tp_size
                expected = state.numpy()[:, piece * mine.shape[1] : (piece + 1) * mine.shape[1]]
                assert np.abs(mine - expected).max() < TOLERANCE, name
        past = past + new


@pytest.mark.parametrize("sizes", [(2, 2, 1), (2, 1, 2), (4, 2, 2), (4, 1, 4), (8, 1, 8)])
def test_all_ranks_together_equal_pytorch(sizes: tuple[int, int, int]) -> None:
    check_against_pytorch(small_config(), ParallelMapping(*sizes))


def test_a_vocabulary_that_does_not_divide() -> None:
    """13 over 8 ranks, two rows each: the seventh has one of its own, the eighth none."""
    config = small_config(vocab_size=13, layer_kinds=("lightning",))
    check_against_pytorch(config, ParallelMapping(8, 1, 8))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, ParallelMapping]:
    moe_tp, moe_ep = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (3, 1)]))
    tp = moe_tp * moe_ep
    heads = draw(st.sampled_from([h for h in (2, 4, 8) if h % tp == 0] or [tp]))
    kv_heads = draw(st.sampled_from([g for g in (1, 2, 4, 8) if heads % g == 0 and (g % tp == 0 or tp % g == 0)]))
    kinds = draw(st.permutations(["lightning", "softmax"])) if heads & (heads - 1) == 0 else ["softmax"]
    experts = moe_ep * draw(st.integers(1, 3))
    return small_config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(3, experts))),
        intermediate_size=moe_tp * draw(st.integers(1, 4)),
        hidden_size=draw(st.sampled_from([8, 20, 36])),
        vocab_size=draw(st.integers(2 * tp, 9 * tp)),
        layer_kinds=tuple(kinds),
    ), ParallelMapping(tp, moe_tp, moe_ep)


@pytest.mark.slow
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(cases())
def test_random_sizes_equal_pytorch(case: tuple[ModelConfig, ParallelMapping]) -> None:
    check_against_pytorch(*case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rank_graphs_are_valid_onnx_and_differ_only_in_numbers(dtype: str) -> None:
    register_schema()
    config = small_config()
    whole, plan = quiet_trace(config, dtype), ShardingPlan(config, ParallelMapping(4, 2, 2))
    before = ir.to_proto(whole).SerializeToString(deterministic=True)
    forms = []
    for rank in plan.mapping.ranks:
        mine = shard(whole, plan, rank)
        verify_with_onnx(mine)
        forms.append(
            [
                (node.op_type, node.name, [v and v.name for v in node.inputs], [str(v.shape) for v in node.outputs])
                for node in mine.graph
            ]
        )
        sums = [n for n in mine.graph if n.op_type == "DistCollective" and "reducesum" in (n.name or "")]
        assert len(sums) == 2
        assert {n.inputs[0].dtype for n in sums if n.inputs[0]} == {ir.DataType.FLOAT}
    assert all(form == forms[0] for form in forms)
    assert ir.to_proto(whole).SerializeToString(deterministic=True) == before  # the trace is left as it was


def test_one_rank_is_the_graph_itself() -> None:
    config = small_config(layer_kinds=("lightning",))
    whole = quiet_trace(config)
    same = shard(whole, ShardingPlan(config, ParallelMapping()), 0)
    assert [n.op_type for n in same.graph] == [n.op_type for n in whole.graph]


def test_an_operator_without_a_rule_is_refused() -> None:
    config = small_config(layer_kinds=("softmax",))
    whole = quiet_trace(config)
    next(node for node in whole.graph if node.op_type == "RotaryEmbedding").op_type = "Softmax"
    with pytest.raises(ExportError, match="no rule to cut the operator Softmax"):
        shard(whole, ShardingPlan(config, ParallelMapping(2, 2, 1)), 0)


class FileSource:
    """A checkpoint of one file of raw fp32 tensors that notes which are read."""

    def __init__(self, plan: ShardingPlan, file: Path) -> None:
        from model_defs.weights import Direct, weight_recipes

        self.read: list[str] = []
        self.entries, offset = {}, 0
        self._data = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
        self._data.tofile(file)
        for name, recipe in weight_recipes(plan.config).items():
            shape = plan.shapes[name]
            if not isinstance(recipe, Direct):
                shape = (shape[1] // 2, shape[2]) if ".fc1." in name else shape[1:]
            for tensor in recipe.tensors:
                count = int(np.prod(shape))
                self.entries[tensor] = _FileEntry(str(file), 4 * offset, 4 * count, "F32", shape)
                offset += count
        assert offset <= len(self._data)

    def array(self, name: str) -> np.ndarray:
        self.read.append(name)
        entry = self.entries[name]
        return self._data[entry.offset // 4 :][: entry.nbytes // 4].reshape(entry.shape)


@dataclasses.dataclass(frozen=True)
class _FileEntry:
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def test_weights_of_ranks_put_together_are_the_checkpoint(tmp_path: Path) -> None:
    config = small_config(layer_kinds=("lightning", "softmax"))
    plan = ShardingPlan(config, ParallelMapping(4, 2, 2))
    whole, source = quiet_trace(config), FileSource(plan, tmp_path / "weights")
    from export.weights import bound_tensor
    from model_defs.weights import weight_recipes

    ranks = []
    for rank in plan.mapping.ranks:
        mine = shard(whole, plan, rank)
        bind_rank_weights(mine, plan, rank, source)
        ranks.append(mine.graph.initializers)
    assert source.read == []  # binding reads nothing
    for name, recipe in weight_recipes(config).items():
        one = bound_tensor(name, recipe, whole.graph.initializers[name], source).numpy()
        joined = np.full(one.shape, np.nan, np.float32)
        for rank, initializers in enumerate(ranks):
            joined[plan.part(name, rank).slices] = initializers[name].const_value.numpy()
        assert np.array_equal(joined, one), name
    # Runs of whole rows stay where they are in the file.
    for name in (
        "layers.0.self_attn.qkv_proj.weight",
        "lm_head.weight",
        "layers.1.self_attn.k_proj.weight",
        "norm.weight",
    ):
        assert isinstance(ranks[1][name].const_value, ir.ExternalTensor), name
    for name in ("layers.0.self_attn.out_proj.weight", "layers.0.block_sparse_moe.fc1.weight"):
        assert isinstance(ranks[1][name].const_value, ir.LazyTensor), name


def test_a_rank_reads_only_its_experts(tmp_path: Path) -> None:
    config = small_config(layer_kinds=("softmax",))
    plan = ShardingPlan(config, ParallelMapping(4, 1, 4))
    source = FileSource(plan, tmp_path / "weights")
    mine = shard(quiet_trace(config), plan, 2)
    bind_rank_weights(mine, plan, 2, source)
    for value in mine.graph.initializers.values():
        value.const_value.numpy()  # type: ignore[union-attr]
    experts = {int(name.split("experts.")[1].split(".")[0]) for name in source.read if ".experts." in name}
    assert experts == {4, 5}


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = small_config(layer_kinds=("softmax",))
    plan = ShardingPlan(config, ParallelMapping(2, 2, 1))
    source = FileSource(plan, tmp_path / "weights")
    name = next(name for name in source.entries if name.endswith("lm_head.weight"))
    source.entries[name] = dataclasses.replace(source.entries[name], shape=(24, 48))
    mine = shard(quiet_trace(config), plan, 0)
    with pytest.raises(ExportError, match=r"lm_head.weight.*\[24, 48\].*\[48, 24\]"):
        bind_rank_weights(mine, plan, 0, source)
