"""Bytes that every rank needs: weights, recurrent states, key/value cache, workspace. Decimal units: 1 GB = 1e9 bytes."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from fractions import Fraction

from export.errors import ExportError
from export.parallel.plan import ShardingPlan
from export.quantize_blocks import check_blocks
from model_defs.quantization import block_scheme
from mxcompile.errors import MxcompileError
from mxcompile.planning.gpus import Gpu

USABLE_SHARE = Fraction(9, 10)  # of a GPU's memory; the rest goes to the driver and to fragmentation
RUNTIME_RESERVE = 4_000_000_000  # CUDA context, communication buffers, engine code and workspace
STATE_BYTES = 4  # the recurrent state is always fp32


@dataclass(frozen=True)
class WeightScheme:
    """Bytes per element by kind of parameter. Norms, router, embedding and lm_head stay at 16 bits in all schemes."""

    key: str
    name: str
    experts: Fraction
    attention: Fraction
    other: Fraction = Fraction(2)

    def bytes_per_element(self, parameter: str) -> Fraction:
        """For a parameter of `TextModel` by its name."""
        if ".fc1." in parameter or ".fc2." in parameter:
            return self.experts
        if ".self_attn." in parameter and not parameter.endswith(".norm.weight"):
            return self.attention
        return self.other


INT4 = Fraction(1, 2) + Fraction(2, 128)  # groups of 128 with one 16-bit scale
SCHEMES = {
    scheme.key: scheme
    for scheme in (
        WeightScheme("bf16", "bf16", Fraction(2), Fraction(2)),
        WeightScheme("int8-experts", "experts 8-bit, rest bf16", Fraction(1), Fraction(2)),
        WeightScheme("int8", "all linear layers 8-bit", Fraction(1), Fraction(1)),
        WeightScheme("int4-experts", "experts 4-bit, attention 8-bit", INT4, Fraction(1)),
        WeightScheme("int4", "all linear layers 4-bit", INT4, INT4),
    )
}

ASSUMPTIONS = (
    "1 GB = 1e9 bytes; contexts: 1k = 1024 tokens, 1M = 1024k",
    f"usable: {float(USABLE_SHARE):.0%} of a GPU's memory, less {RUNTIME_RESERVE / 1e9:.0f} GB for runtime, communication "
    "and workspace (more where the workspace needs more)",
    "recurrent state fp32; 4-bit weights in groups of 128 with a 16-bit scale; 8-bit scales (below 0.1 %) left out",
    "workspace: activations of one prefill chunk in 16 bits with fp32 copies where the model widens, every token routed "
    "to this rank, fp32 lm_head and logits; an upper bound, as engines reuse buffers; ranks that share a chunk's tokens hold one "
    "segment's activations, and one layer's gathered states, keys and values",
)


@dataclass(frozen=True)
class Demand:
    """What one rank is asked to hold."""

    scheme: WeightScheme
    context: int  # tokens of each sequence
    batch: int = 1  # sequences
    cache_bytes: int = 2  # per element of keys and values
    chunk: int = 4096  # tokens of a prefill step


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    weights: int
    state: int
    cache: int
    workspace: int

    @property
    def data(self) -> int:
        """Without the workspace, which is part of the reserve."""
        return self.weights + self.state + self.cache


@dataclass(frozen=True)
class Fit:
    """Whether a demand fits a GPU, and why not."""

    memory: RankMemory
    budget: int  # bytes for weights, state and cache
    fits: bool
    longest_context: int  # tokens per sequence that would fit with this batch; 0 if the weights alone do not
    reason: str  # empty when it fits


def parse_tokens(text: str) -> int:
    """ "128k" -> 131072, "1M" -> 1048576, "5000" -> 5000. Raises MxcompileError."""
    units = {"k": 1024, "m": 1024**2}
    digits, factor = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    if not digits.isdecimal() or int(digits) < 1:
        raise MxcompileError(f"{text!r} is not a number of tokens; write 5000, 128k or 1M")
    return int(digits) * factor


def tokens_text(tokens: int) -> str:
    """131072 -> "128k"; 4412345 -> "4.2M"."""
    if tokens >= 1024**2:
        return f"{tokens / 1024**2:.1f}".removesuffix(".0") + "M"
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def weight_bytes(plan: ShardingPlan, scheme: WeightScheme, rank: int) -> int:
    """Bytes of the rank's weights."""
    sizes = plan.rank_parameters(rank).items()
    return int(sum((size * scheme.bytes_per_element(name) for name, size in sizes), Fraction(0)))


def cpu_weight_bytes(plan: ShardingPlan, quantize: str | None, rank: int) -> int:
    """Bytes of the rank's weights in an engine for ONNX Runtime on CPUs: fp32, or as `mxcompile build --quantize` stores them.

    Raises ExportError where the ranks would cut a block of quantized weights.
    """
    if quantize is not None:
        check_blocks(plan.config, quantize, plan.mapping)
    total = 0
    for name in plan.shapes:
        scheme, size = None if quantize is None else block_scheme(name, quantize), math.prod(plan.held_shape(name))
        total += 4 * size if scheme is None else scheme.stored_width(size) + 4 * size // scheme.block
    return total


def workspace_bytes(plan: ShardingPlan, demand: Demand) -> int:
    """Upper bound of the activations of one step (see ASSUMPTIONS)."""
    config, mapping = plan.config, plan.mapping
    chosen = min(config.num_experts_per_tok, config.num_local_experts // mapping.moe_ep_size)
    per_token = (
        4 * 2 * config.hidden_size  # the residual stream, normed twice, and a branch
        + (3 * (2 + 4) + 3 * 4)
        * config.attention_width
        // mapping.tp_size  # q, k, v in both types; mixed, normed, gate
        + 2 * chosen * (3 * config.intermediate_size // mapping.moe_tp_size + config.hidden_size)  # expanded by expert
    )
    head = 4 * config.vocab_size // mapping.tp_size * config.hidden_size + 4 * 2 * config.vocab_size * demand.batch
    segment = -(-demand.chunk // mapping.cp_size)
    return max(segment, demand.batch) * per_token + head + gathered_bytes(plan, demand.batch, demand.chunk)


def gathered_bytes(plan: ShardingPlan, batch: int, chunk: int) -> int:
    """Most that one layer gathers from the ranks that share a chunk's tokens, with what is made of it: the states before and behind
    each segment, or keys and values in two orders (16 bits).
    """
    sets = plan.mapping.cp_size
    per_layer = [
        2 * sets * batch * item.elements_per_sequence * STATE_BYTES
        if item.fp32
        else 2 * chunk * item.elements_per_token * 2
        for item in plan.segment_exchanges()
    ]
    return max(per_layer, default=0)


def rank_memory(plan: ShardingPlan, demand: Demand, rank: int = 0) -> RankMemory:
    """What `rank` needs for `demand`; the ranks of a plan differ by nothing but which slices they hold."""
    return RankMemory(
        weights=weight_bytes(plan, demand.scheme, rank),
        state=demand.batch * plan.state_elements_per_sequence() * STATE_BYTES,
        cache=demand.batch * demand.context * plan.cache_elements_per_token() * demand.cache_bytes,
        workspace=workspace_bytes(plan, demand),
    )


def fit(plan: ShardingPlan, demand: Demand, gpu: Gpu) -> Fit:
    """Does `demand` fit on one `gpu` per rank."""
    memory = rank_memory(plan, demand)
    usable = int(USABLE_SHARE * int(gpu.memory))
    budget = usable - max(RUNTIME_RESERVE, memory.workspace)
    per_token = demand.batch * plan.cache_elements_per_token() * demand.cache_bytes
    room = budget - memory.weights - memory.state
    longest = max(0, room // per_token) if per_token else (10**12 if room >= 0 else 0)
    fits = memory.data <= budget
    return Fit(memory, budget, fits, longest, "" if fits else _reason(plan, demand, memory, budget, longest))


def _reason(plan: ShardingPlan, demand: Demand, memory: RankMemory, budget: int, longest: int) -> str:
    limit = f"the {budget / 1e9:.1f} GB usable per GPU"
    if memory.weights > budget:
        more = _enough_ranks(plan, demand, budget)
        return (
            f"weights alone are {memory.weights / 1e9:.1f} GB per rank, over {limit}; take "
            + (f"{more} such GPUs or " if more else "")
            + "fewer bits per weight"
        )
    if memory.weights + memory.state > budget:
        return f"weights and the states of {demand.batch} sequences are over {limit}; take a smaller batch"
    return (
        f"the cache of {memory.cache / 1e9:.1f} GB brings the rank to {memory.data / 1e9:.1f} GB, over {limit}; "
        f"up to {tokens_text(longest)} tokens per sequence fit"
    )


def _enough_ranks(plan: ShardingPlan, demand: Demand, budget: int) -> int | None:
    """The smallest multiple of the ranks, by powers of two, on which the weights would fit."""
    mapping = plan.mapping
    for factor in (2, 4, 8):
        with contextlib.suppress(ExportError):
            wider = replace(mapping, tp_size=factor * mapping.tp_size, moe_tp_size=factor * mapping.moe_tp_size)
            if weight_bytes(ShardingPlan(plan.config, wider), demand.scheme, 0) <= budget:
                return len(wider.ranks)
    return None
