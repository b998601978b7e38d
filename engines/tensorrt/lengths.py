"""How many positions a cache gets, and how the valid lengths reach attention."""

from __future__ import annotations

from engines.tensorrt.lowering import Attention

MAX_MASK_BYTES = 1 << 26  # of a boolean mask: batch * new tokens * capacity
_MULTIPLE = 64  # capacities are multiples of a tile of the attention kernels


def capacity_for(max_seq_len: int) -> int:
    """Positions of the cache: one more than the longest row, because an idle row at its limit still gets a key written
    behind its end in a decode step; rounded up to whole tiles.
    """
    return -(-(max_seq_len + 1) // _MULTIPLE) * _MULTIPLE


def attention_for(max_batch_size: int, prefill_chunk: int, capacity: int) -> Attention:
    """A mask where it is small: TensorRT then takes its own attention kernel, which passes over the whole capacity. Our
    plugin where the mask would be large: it reads each row up to its length and no further.
    """
    return "mask" if max_batch_size * prefill_chunk * capacity <= MAX_MASK_BYTES else "plugin"
