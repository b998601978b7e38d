"""Optimization profiles: the shapes that an engine must take, and those it should be fast at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DECODE, PREFILL = 0, 1  # indices of the two profiles
# Logits of all tokens of a chunk are wanted only to compare with a reference; above this size the engine gives the last token's.
MAX_LOGITS_BYTES = 1 << 30


@dataclass(frozen=True)
class Shapes:
    """Limits that the profiles are made from."""

    max_batch_size: int
    prefill_chunk: int
    vocab_size: int

    @property
    def max_positions(self) -> int:
        """Most logit positions of one step."""
        fits = self.max_batch_size * self.prefill_chunk * self.vocab_size * 4 <= MAX_LOGITS_BYTES
        return self.prefill_chunk if fits else 1


def add_profiles(builder: Any, config: Any, network: Any, shapes: Shapes) -> None:
    """One profile for single-token decode and one for prefill chunks, in that order."""
    for tokens, positions in ((1, 1), (shapes.prefill_chunk, shapes.max_positions)):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if all(dim >= 0 for dim in tensor.shape):
                continue  # a weight
            smallest, usual, largest = (
                _dims(tensor, batch, new, asked)
                for batch, new, asked in (
                    (1, 1, 1),
                    (1, tokens, 1),
                    (shapes.max_batch_size, tokens, positions),
                )
            )
            profile.set_shape(tensor.name, smallest, usual, largest)
        config.add_optimization_profile(profile)


def _dims(tensor: Any, batch: int, tokens: int, positions: int) -> tuple[int, ...]:
    second = {"input_ids": tokens, "logit_positions": positions}
    rest = [second.get(tensor.name, dim) if dim < 0 else dim for dim in list(tensor.shape)[1:]]
    return (batch, *rest)
