"""What every rank holds: one table says how each parameter of `TextModel` is cut and where a collective follows.

Cuts are contiguous ranges of an axis, so a rank's part of a checkpoint tensor is a slice of its file. Nothing here touches weights.

| what is cut              | by                 | so that                                                              |
|--------------------------|--------------------|----------------------------------------------------------------------|
| attention heads          | tp_size            | rows of one head (q, k and v together in lightning layers) stay whole |
| key/value heads          | min(tp_size, G)    | with more ranks than heads, neighbouring ranks hold the same head    |
| experts                  | moe_ep_size        | contiguous ranges                                                    |
| inner width of an expert | moe_tp_size        | gate and up rows of a channel are neighbours and stay together       |
| vocabulary               | tp_size            | embedding rows and logits; padded with zeros where it does not divide |
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache

from export.contract import state_specs
from export.errors import ExportError
from export.parallel.mapping import ParallelMapping, kv_parts
from model_defs.config import ModelConfig
from model_defs.weights import weight_recipes


class Shared(Enum):
    """What ranks share out among them."""

    HEADS = "attention heads"
    KV_HEADS = "key/value heads"
    EXPERTS = "experts"
    INNER = "inner width"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Rule:
    """How parameters whose names match `pattern` are cut: axis -> what the axis counts. No axes: every rank holds all of it."""

    pattern: str
    cuts: tuple[tuple[int, Shared], ...] = ()


RULES: tuple[Rule, ...] = (
    Rule("embed_tokens.weight", ((0, Shared.VOCABULARY),)),
    Rule("lm_head.weight", ((0, Shared.VOCABULARY),)),
    Rule("layers.*.self_attn.qkv_proj.weight", ((0, Shared.HEADS),)),
    Rule("layers.*.self_attn.output_gate.weight", ((0, Shared.HEADS),)),
    Rule("layers.*.self_attn.norm.weight", ((0, Shared.HEADS),)),
    Rule("layers.*.self_attn.out_proj.weight", ((1, Shared.HEADS),)),
    Rule("layers.*.self_attn.q_proj.weight", ((0, Shared.HEADS),)),
    Rule("layers.*.self_attn.k_proj.weight", ((0, Shared.KV_HEADS),)),
    Rule("layers.*.self_attn.v_proj.weight", ((0, Shared.KV_HEADS),)),
    Rule("layers.*.self_attn.o_proj.weight", ((1, Shared.HEADS),)),
    Rule("layers.*.block_sparse_moe.gate.weight"),
    Rule("layers.*.block_sparse_moe.fc1.weight", ((0, Shared.EXPERTS), (1, Shared.INNER))),
    Rule("layers.*.block_sparse_moe.fc2.weight", ((0, Shared.EXPERTS), (2, Shared.INNER))),
    Rule("layers.*.input_layernorm.weight"),
    Rule("layers.*.post_attention_layernorm.weight"),
    Rule("norm.weight"),
)


@dataclass(frozen=True)
class Collective:
    """One exchange between all ranks in a step."""

    after: str  # what it follows
    operation: str  # "all_reduce" (sum) or "all_gather"
    elements_per_token: int  # that each rank gives in; for logits, per position asked for
    fp32: bool  # else in the type of the activations
    count: int  # of them in a step


@dataclass(frozen=True)
class SegmentExchange:
    """One exchange of a prefill chunk between the ranks that share its tokens (`export.parallel.context`)."""

    of: str  # what is exchanged
    operation: str  # "all_gather", or "all_reduce" (sum)
    elements_per_sequence: int  # that each rank gives in, whatever the chunk's length
    elements_per_token: int  # that each rank gives in besides, for every token of its segment
    fp32: bool  # else in the type of the activations
    count: int  # of them in a chunk


@dataclass(frozen=True)
class Part:
    """One rank's part of a parameter: a range of each axis."""

    ranges: tuple[tuple[int, int], ...]  # start, end

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.ranges)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, end) for start, end in self.ranges)


class ShardingPlan:
    """The plan of one model on one mapping. Raises ExportError when the sizes do not fit together."""

    def __init__(self, config: ModelConfig, mapping: ParallelMapping) -> None:
        mapping.check(config)
        self.config, self.mapping = config, mapping
        self._held: dict[int, dict[str, int]] = {}  # by rank

    def pieces(self, shared: Shared) -> int:
        """Into how many different pieces `shared` is cut."""
        mapping = self.mapping
        return {
            Shared.HEADS: mapping.tp_size,
            Shared.KV_HEADS: kv_parts(self.config, mapping.tp_size),
            Shared.EXPERTS: mapping.moe_ep_size,
            Shared.INNER: mapping.moe_tp_size,
            Shared.VOCABULARY: mapping.tp_size,
        }[shared]

    def piece(self, shared: Shared, rank: int) -> int:
        """Which of the pieces `rank` holds."""
        if shared is Shared.EXPERTS:
            return self.mapping.moe_ep_rank(rank)
        if shared is Shared.INNER:
            return self.mapping.moe_tp_rank(rank)
        return self.mapping.tp_rank(rank) * self.pieces(shared) // self.mapping.tp_size

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the whole model, in the model's order."""
        return dict(_shapes(self.config))

    def part(self, name: str, rank: int) -> Part:
        """The part of parameter `name` that `rank` holds."""
        ranges = [(0, length) for length in self.shapes[name]]
        for axis, shared in rule_of(name).cuts:
            whole, length, piece = self.shapes[name][axis], self.held_shape(name)[axis], self.piece(shared, rank)
            ranges[axis] = (min(piece * length, whole), min((piece + 1) * length, whole))
        return Part(tuple(ranges))

    def held_shape(self, name: str) -> tuple[int, ...]:
        """Shape of parameter `name` in every rank's graph: that of a part, and zeros behind it where the last ranks' parts are smaller."""
        shape = list(self.shapes[name])
        for axis, shared in rule_of(name).cuts:
            shape[axis] = -(
                -shape[axis] // self.pieces(shared)
            )  # only a vocabulary need not divide: `ParallelMapping.check`
        return tuple(shape)

    def copies(self, name: str) -> int:
        """How many ranks hold the same part of parameter `name`."""
        distinct = math.prod(self.pieces(shared) for _, shared in rule_of(name).cuts)
        return len(self.mapping.ranks) // distinct

    def rank_parameters(self, rank: int) -> dict[str, int]:
        """Elements that `rank` holds of every parameter."""
        if rank not in self._held:
            self._held[rank] = {name: self.part(name, rank).size for name in self.shapes}
        return self._held[rank]

    def state_dims(self, rank: int) -> dict[str, tuple[int | str, ...]]:
        """Dimensions of the rank's states by input name; as `export.contract.state_specs`, with the rank's heads."""
        pieces = {"recurrent_state": self.pieces(Shared.HEADS), "key": self.pieces(Shared.KV_HEADS)}
        pieces["value"] = pieces["key"]
        dims: dict[str, tuple[int | str, ...]] = {}
        for spec in state_specs(self.config):
            batch, heads, *rest = spec.dims
            assert isinstance(heads, int)
            dims[spec.input_name] = (batch, heads // pieces[spec.kind], *rest)
        return dims

    def state_elements_per_sequence(self) -> int:
        """Recurrent state of one sequence on each rank, in elements (fp32); independent of its length."""
        return self.config.state_elements_per_sequence() // self.pieces(Shared.HEADS)

    def cache_elements_per_token(self) -> int:
        """Key and value cache of one token on each rank, in elements."""
        return self.config.cache_elements_per_token() // self.pieces(Shared.KV_HEADS)

    def collectives(self) -> tuple[Collective, ...]:
        """Every exchange of one step, in the order of a layer; empty on one rank."""
        config = self.config
        if self.mapping.tp_size == 1:
            return ()
        hidden, lightning = config.hidden_size, len(config.lightning_layers)
        found = [
            Collective("embedding", "all_reduce", hidden, False, 1),
            Collective("sum of squares of the lightning norm", "all_reduce", 1, True, lightning),
            Collective("out_proj and o_proj", "all_reduce", hidden, False, config.num_layers),
            Collective("experts", "all_reduce", hidden, False, config.num_layers),
            Collective("logits", "all_gather", -(-config.vocab_size // self.mapping.tp_size), True, 1),
        ]
        return tuple(item for item in found if item.count)

    def segment_exchanges(self) -> tuple[SegmentExchange, ...]:
        """Every exchange of a prefill chunk over the ranks that share its tokens; empty where none do."""
        config, lightning = self.config, len(self.config.lightning_layers)
        if self.mapping.cp_size == 1:
            return ()
        state = self.state_elements_per_sequence() // max(1, lightning)
        keys = self.cache_elements_per_token() // max(1, len(config.softmax_layers))
        found = [
            SegmentExchange("states that segments leave", "all_gather", state, 0, True, lightning),
            SegmentExchange("keys and values", "all_gather", 0, keys, False, len(config.softmax_layers)),
            SegmentExchange("hidden row with logits", "all_reduce", config.hidden_size, 0, False, 1),
        ]
        return tuple(item for item in found if item.count)


@lru_cache(maxsize=4096)  # a plan asks hundreds of times about each of a thousand names
def rule_of(name: str) -> Rule:
    """The one rule for a parameter; ExportError when the table has none, so that no weight is replicated by accident."""
    for rule in RULES:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule
    raise ExportError(f"no sharding rule for the parameter {name!r}")


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, vocabulary = config.hidden_size, config.attention_width, config.vocab_size
    kv_width = config.num_key_value_heads * config.head_dim
    experts, inner = config.num_local_experts, config.intermediate_size
    by_last_names: dict[str, tuple[int, ...]] = {
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "qkv_proj": (3 * width, hidden),
        "output_gate": (width, hidden),
        "self_attn.norm": (width,),
        "out_proj": (hidden, width),
        "q_proj": (width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, width),
        "gate": (experts, hidden),
        "fc1": (experts, 2 * inner, hidden),
        "fc2": (experts, hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "norm": (hidden,),
    }
    for name in weight_recipes(config):
        parts = name.removesuffix(".weight").split(".")
        yield name, by_last_names.get(".".join(parts[-2:])) or by_last_names[parts[-1]]
