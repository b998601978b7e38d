"""How many ranks there are and what each one is, in the names and the order of TensorRT-LLM.

`tp_size` ranks share the attention layers by heads. Inside the mixture of experts the same ranks form a grid of
`moe_tp_size` x `moe_ep_size`: experts are cut into contiguous ranges over `moe_ep_size`, the inner width of each expert over
`moe_tp_size`. The expert index moves fastest: rank = moe_tp_rank * moe_ep_size + moe_ep_rank.

`cp_size` such sets of ranks share the tokens of a prefill chunk (`export.parallel.context`); each holds the whole model and all
states. The rank inside a set moves fastest: rank = cp_rank * tp_size + tp_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from export.errors import ExportError
from model_defs.config import ModelConfig

LARGEST_SIZE = 1024  # up to where a possible size is looked for


@dataclass(frozen=True)
class ParallelMapping:
    """The sizes of a run on several ranks. Use `ParallelMapping.of` to fill in what the user left out."""

    tp_size: int = 1
    moe_tp_size: int = 1
    moe_ep_size: int = 1
    cp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp_size", "moe_tp_size", "moe_ep_size", "cp_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ExportError(f"{name} must be a positive whole number, not {value!r}")
        if self.moe_tp_size * self.moe_ep_size != self.tp_size:
            raise ExportError(
                f"moe_tp_size ({self.moe_tp_size}) x moe_ep_size ({self.moe_ep_size}) is "
                f"{self.moe_tp_size * self.moe_ep_size}, but must be tp_size ({self.tp_size}): the experts are shared by "
                "the same ranks as the attention"
            )

    @classmethod
    def of(
        cls, tp_size: int, moe_tp_size: int | None = None, moe_ep_size: int | None = None, cp_size: int = 1
    ) -> ParallelMapping:
        """Fill in the expert sizes: with neither given, experts are cut by inner width only, as TensorRT-LLM does."""
        if moe_tp_size is None and moe_ep_size is None:
            return cls(tp_size, tp_size, 1, cp_size)
        given, name = (moe_ep_size, "moe_ep_size") if moe_tp_size is None else (moe_tp_size, "moe_tp_size")
        if moe_tp_size is not None and moe_ep_size is not None:
            return cls(tp_size, moe_tp_size, moe_ep_size, cp_size)
        assert given is not None
        if given < 1 or tp_size % given:
            raise ExportError(
                f"{name} {given} does not divide tp_size {tp_size}; "
                f"{_nearest(given, range(1, tp_size + 1), lambda size: tp_size % size == 0)}"
            )
        other = tp_size // given
        return cls(tp_size, *((other, given) if moe_tp_size is None else (given, other)), cp_size)

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(self.tp_size * self.cp_size)

    def tp_rank(self, rank: int) -> int:
        """Which part of the model `rank` holds."""
        return rank % self.tp_size

    def cp_rank(self, rank: int) -> int:
        """Which segment of a prefill chunk `rank` takes."""
        return rank // self.tp_size

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that share a model with `rank`; empty where that is all of them."""
        first = self.cp_rank(rank) * self.tp_size
        return tuple(range(first, first + self.tp_size)) if self.cp_size > 1 else ()

    def cp_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part of the model as `rank`, in the order of segments; empty where that is all of them."""
        return tuple(self.ranks)[self.tp_rank(rank) :: self.tp_size] if self.tp_size > 1 else ()

    def moe_ep_rank(self, rank: int) -> int:
        """Which range of experts `rank` holds."""
        return self.tp_rank(rank) % self.moe_ep_size

    def moe_tp_rank(self, rank: int) -> int:
        """Which part of each expert's inner width `rank` holds."""
        return self.tp_rank(rank) // self.moe_ep_size

    def check(self, config: ModelConfig, block: int = 1) -> None:
        """Raise ExportError with the reason and the nearest possible sizes if `config` cannot be cut like this.

        block: neighbouring columns of a weight that share a scale and must stay on one rank (`export.quantize_blocks`).
        """
        for problem in _tp_problems(config, self.tp_size, block):
            possible = _nearest(
                self.tp_size, range(1, LARGEST_SIZE + 1), lambda size: not _tp_problems(config, size, block)
            )
            raise ExportError(f"tp_size {self.tp_size}: {problem}; {possible}")
        divisors = [size for size in range(1, self.tp_size + 1) if self.tp_size % size == 0]
        if config.num_local_experts % self.moe_ep_size:
            possible = _nearest(self.moe_ep_size, divisors, lambda size: config.num_local_experts % size == 0)
            raise ExportError(
                f"moe_ep_size {self.moe_ep_size}: the {config.num_local_experts} experts do not divide by it; {possible}"
            )
        if config.intermediate_size % (self.moe_tp_size * block):
            possible = _nearest(self.moe_tp_size, divisors, lambda size: config.intermediate_size % (size * block) == 0)
            blocks = f" in blocks of {block}" if block > 1 else ""
            whole = (
                f"; moe_ep_size {self.tp_size} leaves experts whole"
                if not config.num_local_experts % self.tp_size
                else ""
            )
            raise ExportError(
                f"moe_tp_size {self.moe_tp_size}: the experts' inner width of {config.intermediate_size}{blocks} does not divide "
                f"by it; {possible}{whole if block > 1 else ''}"
            )


def kv_parts(config: ModelConfig, tp_size: int) -> int:
    """Into how many different pieces the key/value heads are cut; with more ranks than heads, ranks share a head."""
    return min(tp_size, config.num_key_value_heads)


def _tp_problems(config: ModelConfig, tp_size: int, block: int = 1) -> list[str]:
    problems = []
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tp_size:
        problems.append(f"the {heads} attention heads do not divide by it")
    elif config.attention_width % (tp_size * block):
        problems.append(f"the heads' width of {config.attention_width} in blocks of {block} does not divide by it")
    if config.softmax_layers and kv_heads % tp_size and tp_size % kv_heads:
        problems.append(f"the {kv_heads} key/value heads neither divide by it nor it by them")
    return problems


def _nearest(wanted: int, sizes: Iterable[int], possible: Callable[[int], bool]) -> str:
    """ "possible near it: 4 and 8"."""
    allowed = [size for size in sizes if possible(size)]
    below = max((size for size in allowed if size < wanted), default=None)
    above = min((size for size in allowed if size > wanted), default=None)
    found = [str(size) for size in (below, above) if size is not None]
    return f"possible near it: {' and '.join(found)}" if found else "no other size is possible"
