"""What a validation runs."""

from __future__ import annotations

from dataclasses import dataclass

from mxcompile.errors import MxcompileError

LENGTHS = (1, 63, 64, 65, 255, 256, 257, 1000)
"""Prompt lengths around the block sizes at which implementations switch, and a long one."""
QUICK_LENGTHS = (1, 64, 65, 257)
REFERENCE_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class ValidationOptions:
    """`quick` runs fewer lengths, chunks and tokens of the same checks; the report says so.

    lengths: prompt lengths in tokens, default LENGTHS or QUICK_LENGTHS. seed: of the random prompts. threads: CPU threads, default
    each runtime's own. force: compare although the engine was built from another checkpoint. stream_weights: PyTorch reads its weights
    from the checkpoint whenever they are used; default: if they do not fit into memory.
    """

    quick: bool = False
    lengths: tuple[int, ...] | None = None
    seed: int = 0
    threads: int | None = None
    reference_dtype: str = "float32"
    force: bool = False
    stream_weights: bool | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise MxcompileError(f"prompt lengths must be at least 1, not {list(self.lengths)}")
        if self.reference_dtype not in REFERENCE_DTYPES:
            known = ", ".join(REFERENCE_DTYPES)
            raise MxcompileError(f"the reference dtype must be one of {known}, not {self.reference_dtype!r}")
        if self.seed < 0:
            raise MxcompileError(f"the seed must not be negative, not {self.seed}")

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.lengths or (QUICK_LENGTHS if self.quick else LENGTHS))))

    @property
    def decode_steps(self) -> int:
        """Tokens decoded behind every prompt."""
        return 4 if self.quick else 8

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunk sizes of chunked prefill: block-sized ones, one that divides nothing, and a small one."""
        return (64, 100) if self.quick else (7, 64, 100, 256)

    @property
    def ragged_batches(self) -> tuple[tuple[int, ...], ...]:
        """Prompt lengths of the rows of each batch; 0 is an idle row."""
        return ((65, 0, 1, 64),) if self.quick else ((65, 0, 1, 257), (64, 64), (255, 3, 256, 63, 0, 1))

    @property
    def stepwise_length(self) -> int:
        """Tokens of the prompt that is read token by token."""
        return 65 if self.quick else 257

    @property
    def layer_length(self) -> int:
        """Tokens of the prompt on which layers are compared."""
        return 257

    @property
    def greedy_tokens(self) -> int:
        return 50 if self.quick else 200

    @property
    def greedy_prompts(self) -> tuple[int, ...]:
        """Lengths of the prompts that greedy generation continues."""
        return (65,) if self.quick else (1, 64, 257)
