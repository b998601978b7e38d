"""Lower bounds of prefill and decode times: arithmetic at the full bf16 rate, memory at its full bandwidth, ranks in perfect
balance, communication hidden behind both. What a measured time is to be compared with, not a forecast.

The counts follow the model's arithmetic (reference: Text-01 at 91.9 GFLOP of matrix products per token, 0.88 for the lightning
core in prefill and 327,680 x context for the softmax core).
"""

from __future__ import annotations

from dataclasses import dataclass

from export.parallel.plan import ShardingPlan
from model_defs.config import ModelConfig
from mxcompile.planning.gpus import Gpu
from mxcompile.planning.memory import STATE_BYTES, WeightScheme

LIGHTNING_BLOCK = 256  # tokens of a block in prefill; the dense square is counted

ASSUMPTIONS = (
    "all arithmetic at the dense bf16 rate (weights of fewer bits are widened first), all bandwidth used, ranks in balance",
    "prefill: lm_head for the last token only, lightning in dense blocks of 256 tokens; weights are read once and do not count",
    "decode: uniform routing decides how many experts a batch touches; every touched expert is read once per step, the "
    "embedding is not read; states are read and written, the cache is read",
    "exchange: ring all-reduce of 16-bit activations over NVLink, between all ranks; shown beside the bound, as it can overlap",
    "ranks that share a chunk's tokens also gather fp32 states once per chunk, and keys and values; in the first chunks later segments "
    "see more keys, which balance leaves out; decode gains nothing from these ranks",
)


@dataclass(frozen=True)
class Prefill:
    """One prompt."""

    context: int
    flops: float  # of all ranks
    seconds: float  # at the full rate
    softmax_share: float  # of the arithmetic
    exchange_seconds: float

    def at(self, utilisation: float) -> float:
        """Seconds at this share of the full rate."""
        return self.seconds / utilisation


@dataclass(frozen=True)
class Decode:
    """One step of a batch."""

    batch: int
    context: int
    flops: float  # of all ranks
    bytes_per_rank: float
    memory_seconds: float
    compute_seconds: float
    experts_touched: float  # per layer, expected

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def bound(self) -> str:
        return "memory" if self.memory_seconds >= self.compute_seconds else "arithmetic"


def matmul_flops(config: ModelConfig) -> int:
    """Of one token in all layers, without lm_head."""
    counts = config.parameter_counts()
    expert = 3 * config.hidden_size * config.intermediate_size
    norms = len(config.lightning_layers) * config.attention_width
    dense = counts["lightning attention"] - norms + counts["softmax attention"] + counts["router"]
    return 2 * (dense + config.num_layers * config.num_experts_per_tok * expert)


def head_flops(config: ModelConfig) -> int:
    """lm_head for one token."""
    return 2 * config.vocab_size * config.hidden_size


def lightning_flops(config: ModelConfig, *, decode: bool) -> int:
    """The lightning core for one token: 5 d^2 per head in decode; blocks of 256 in prefill."""
    width = config.head_dim
    per_head = 5 * width**2 if decode else 4 * LIGHTNING_BLOCK * width + 4 * width**2
    return len(config.lightning_layers) * config.num_attention_heads * per_head


def softmax_flops(config: ModelConfig, keys: int) -> int:
    """The softmax core for one query against `keys` keys."""
    return len(config.softmax_layers) * config.attention_width * 4 * keys


def touched_experts(config: ModelConfig, batch: int) -> float:
    """Expected number of different experts that `batch` tokens use in a layer, with uniform routing."""
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)


def segment_bytes(plan: ShardingPlan, tokens: int, cache_bytes: int = 2) -> dict[str, int]:
    """Bytes that a rank receives from the ranks with which it shares a chunk of `tokens` tokens of one sequence, by what they are."""
    others, segment = plan.mapping.cp_size - 1, -(-tokens // plan.mapping.cp_size)
    return {
        item.of: item.count
        * others
        * (item.elements_per_sequence + segment * item.elements_per_token)
        * (STATE_BYTES if item.fp32 else cache_bytes)
        for item in plan.segment_exchanges()
    }


def prefill(plan: ShardingPlan, gpu: Gpu, context: int, chunk: int = 4096) -> Prefill:
    """A prompt of `context` tokens on one `gpu` per rank, in chunks of `chunk` tokens."""
    config, ranks, parts = plan.config, len(plan.mapping.ranks), plan.mapping.tp_size
    softmax = softmax_flops(config, 1) * context * (context + 1) / 2
    flops = (
        (matmul_flops(config) + lightning_flops(config, decode=False)) * context + head_flops(config) + float(softmax)
    )
    per_token = sum(
        item.count * item.elements_per_token * (4 if item.fp32 else 2)
        for item in plan.collectives()
        if item.operation == "all_reduce"
    )
    exchange = context / plan.mapping.cp_size * per_token * 2 * (parts - 1) / parts / gpu.link
    whole, rest = divmod(context, chunk)
    for tokens, times in ((chunk, whole), (rest, 1 if rest else 0)):
        exchange += times * sum(segment_bytes(plan, tokens).values()) / gpu.link
    return Prefill(context, flops, flops / (ranks * gpu.bf16), softmax / flops, exchange)


def decode(
    plan: ShardingPlan, gpu: Gpu, scheme: WeightScheme, batch: int, context: int, cache_bytes: int = 2
) -> Decode:
    """One token for each of `batch` sequences of `context` tokens."""
    config, ranks = plan.config, plan.mapping.tp_size
    touched = touched_experts(config, batch)
    weights = 0.0
    for name, size in plan.rank_parameters(0).items():
        if name != "embed_tokens.weight":
            share = touched / config.num_local_experts if ".fc1." in name or ".fc2." in name else 1.0
            weights += size * share * float(scheme.bytes_per_element(name))
    states = 2 * STATE_BYTES * plan.state_elements_per_sequence() * batch
    cache = plan.cache_elements_per_token() * cache_bytes * context * batch
    moved = weights + states + cache
    per_token = matmul_flops(config) + head_flops(config) + lightning_flops(config, decode=True)
    flops = float(batch * (per_token + softmax_flops(config, context)))
    return Decode(batch, context, flops, moved, moved / gpu.bandwidth, flops / (ranks * gpu.bf16), touched)
