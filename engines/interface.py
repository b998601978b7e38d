"""What every engine session offers, whatever compiled it: the door that run, validate, bench and serve use.

A session holds weights and code and is shared; a state holds what one batch of sequences remembers. The
batch has fixed rows (slots); each row has its own length, so rows may be ragged, idle or refilled.

Shape suffixes: B batch rows, T new tokens, P positions with logits, N vocabulary, G kv heads, H heads,
K and V head dims, L layers, n places of images, D hidden size.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from engines.config import EngineConfig
from engines.errors import EngineError

if TYPE_CHECKING:
    from engines.vision.pixels import PreparedImage

Positions = Literal["last", "all"] | np.ndarray


@dataclass(frozen=True)
class StepResult:
    """Result of one `forward`.

    `logits`: float32 [B, P, N]. P is 1 for "last", T for "all", else the given number of positions. Values at
    positions that are not valid tokens of a row (padding, rows without new tokens) are 0.
    `taps`: per tap name a float32 array [B, T, ...]; 0 at padding. Empty unless asked for.
    """

    logits: np.ndarray
    taps: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class RowSnapshot:
    """Everything one row remembers, copied out of a state: for prefix caches, preemption and tests.

    `recurrent[layer]` float32 [H, K, V]; `key[layer]`, `value[layer]` float32 [G, length, K], or [G, length - start, K]
    in a part that `read_row` cut; a part cannot be written back.
    """

    length: int
    recurrent: dict[int, np.ndarray]
    key: dict[int, np.ndarray]
    value: dict[int, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for part in (self.recurrent, self.key, self.value) for a in part.values())


def check_start(start: int, length: int) -> None:
    """The common check of `State.read_row`."""
    if not 0 <= start <= length:
        raise EngineError(f"a row of {length} tokens cannot be read from token {start} on")


@runtime_checkable
class State(Protocol):
    """What a batch of `batch_size` sequences remembers between calls."""

    @property
    def batch_size(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B]: tokens each row has seen. Read it freely; change rows through the methods below."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens the KV cache has room for now; grows by itself up to the session's limit."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all state buffers as allocated now."""
        ...

    def recurrent(self, layer: int) -> np.ndarray:
        """Copy of a lightning layer's state, float32 [B, H, K, V]. EngineError for another kind of layer."""
        ...

    def key(self, layer: int) -> np.ndarray:
        """Copy of a softmax layer's keys, float32 [B, G, n, K] with n = max(lengths); 0 beyond a row's length."""
        ...

    def value(self, layer: int) -> np.ndarray:
        """As `key`, for the values."""
        ...

    def read_row(self, row: int, start: int = 0) -> RowSnapshot:
        """Copy out what `row` remembers; of its keys and values only those of the tokens from `start` on, so that the
        cost grows with what is new. EngineError unless 0 <= start <= length.
        """
        ...

    def write_row(self, row: int, snapshot: RowSnapshot) -> None:
        """Replace what `row` remembers (any session's snapshot of the same model and a fitting length)."""
        ...

    def clear_row(self, row: int) -> None:
        """Make `row` a fresh sequence: length 0, states zero."""
        ...


@runtime_checkable
class ImageState(State, Protocol):
    """A state of a session whose model takes images."""

    def place_images(self, row: int, positions_n: np.ndarray, features_nD: np.ndarray) -> None:
        """Let rows of features take the places of tokens that `row` gets later.

        `positions_n`: ascending positions in the row's whole sequence, none before its length; `features_nD`: float32, as
        `ImageSession.image_features` gives them. It does not matter in what pieces the tokens then come; their ids are ignored.
        Replaces what waited for the row; `write_row` and `clear_row` forget it.
        """
        ...


@runtime_checkable
class Session(Protocol):
    """A loaded engine. Calls on one session must not overlap in time; states may be many."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def max_seq_len(self) -> int: ...

    @property
    def max_batch_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def new_state(self, batch_size: int) -> State:
        """Buffers for `batch_size` rows, all empty."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], state: State, chunk: int | None = None) -> np.ndarray:
        """Append each row's tokens to what it remembers; logits float32 [B, N] of each row's last new token.

        `prompts` has one entry per row; an empty entry leaves its row untouched (its logits are 0). Long prompts
        run in chunks of `chunk` tokens (default: the engine's own); the result does not depend on it.
        """
        ...

    def decode(self, tokens_B: np.ndarray | Sequence[int], state: State) -> np.ndarray:
        """One token for every row; logits float32 [B, N]. The array is the caller's to keep."""
        ...

    def forward(
        self,
        ids_BT: np.ndarray,
        new_lengths_B: np.ndarray | Sequence[int],
        state: State,
        positions: Positions = "last",
        taps: bool = False,
    ) -> StepResult:
        """The primitive: `ids_BT` right-padded, `new_lengths_B` valid tokens per row.

        Rows with new length 0 keep their states bit for bit. `positions`: "last" valid token, "all" T tokens, or int
        [B, P] indices into the T new tokens. Runs as one piece, without chunks. Raises EngineError naming the
        numbers when a row would pass `max_seq_len`, an id lies outside the vocabulary or shapes do not fit.
        """
        ...


@runtime_checkable
class ImageSession(Session, Protocol):
    """A session whose model may take images; `config.vision` says whether it does. Its states are `ImageState`."""

    def image_features(self, images: Sequence[PreparedImage]) -> np.ndarray:
        """What the images put into a prompt, one after the other, float32 [tokens, D]."""
        ...


@runtime_checkable
class SteppedImageSession(ImageSession, Protocol):
    """An image session that other work need not wait for until a whole image is done."""

    def image_steps(self, image: PreparedImage) -> Generator[None, None, np.ndarray]:
        """`image_features` of one image in steps: `next` does one, a small part of the work, and the last one raises StopIteration
        with the result. Other calls on the session may come between two steps.
        """
        ...
