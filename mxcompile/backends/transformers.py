"""The transformers port as a session, as a contestant in benchmarks.

Its results are not a reference. Known faults of the port (5.23): rotary embedding turns all channels of a head instead of the first
half, recurrent states are kept in the model's type instead of fp32, and a second chunk of a prompt is read token by token. Prompts are
therefore read whole, in rows of equal length. The faults change its output and hardly its time.

Shape suffixes: B batch rows, T new tokens, N vocabulary.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engines.errors import EngineError

if TYPE_CHECKING:
    from model_defs.checkpoint.reader import Checkpoint

TARGET = "transformers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_BATCH_SIZE = 64
FAULTS = (
    "the port turns all channels of a head in rotary embedding instead of the first half, so its output differs",
    "it keeps recurrent states in the model's type instead of fp32",
    "it cannot read a prompt in chunks, so prompts are read whole",
)


class TransformersState:
    """What `batch_size` sequences of equal length remember."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.length = 0
        self.cache: Any = None

    @property
    def lengths(self) -> np.ndarray:
        return np.full(self.batch_size, self.length, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of recurrent states and of cached keys and values."""
        if self.cache is None:
            return 0
        tensors = [item for item in self.cache.linear_cache if isinstance(item, torch.Tensor)]
        for layer in self.cache.layers:
            tensors += [t for t in (layer.keys, layer.values) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)


class TransformersSession:
    """`MiniMaxForCausalLM` with the part of `engines.interface.Session` that timing needs."""

    notes = FAULTS

    def __init__(self, model: Any, *, threads: int | None = None) -> None:
        """Args:
        model: a MiniMaxForCausalLM with its weights.
        threads: CPU threads of torch while this session computes; default: torch's own setting.
        """
        self.model = model.eval()
        self._threads = threads

    @classmethod
    def load(
        cls, checkpoint: str | os.PathLike[str] | Checkpoint, dtype: str = "float32", *, threads: int | None = None
    ) -> TransformersSession:
        """Load a checkpoint folder of any schema; its weights are read where they lie, its configuration is translated in memory.

        Raises CheckpointError or ConfigError for a bad checkpoint, EngineError for an unknown dtype or weights that do not fit the
        port, ImportError without transformers.
        """
        from model_defs.checkpoint.reader import Checkpoint
        from model_defs.config_schemas import config_to_schema

        if dtype not in DTYPES:
            raise EngineError(f"transformers runs here in {', '.join(DTYPES)}, not in {dtype!r}")
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        if opened.config.tensor_prefix:
            raise EngineError(
                f"{opened.folder}: the language model of a {opened.config.family} checkpoint cannot be loaded by transformers"
            )
        import transformers

        values = config_to_schema(opened.config, "hf", dtype=dtype)
        with _quiet(transformers):
            loaded: Any = transformers.MiniMaxForCausalLM.from_pretrained(
                opened.folder,
                config=transformers.MiniMaxConfig.from_dict(values),
                dtype=DTYPES[dtype],
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        model, found = loaded
        # Decay factors are computed, not stored; everything else must come from the checkpoint.
        buffers = {name for name, _ in model.named_buffers()}
        problems = sorted(set(found["missing_keys"]) - buffers) + sorted(found["unexpected_keys"])
        problems += [str(item) for item in found["mismatched_keys"]]
        if problems:
            raise EngineError(
                f"{opened.folder}: transformers cannot place weight {problems[0]} ({len(problems)} in all)"
            )
        return cls(model, threads=threads)

    @property
    def max_seq_len(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @property
    def max_batch_size(self) -> int:
        return MAX_BATCH_SIZE

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def new_state(self, batch_size: int) -> TransformersState:
        if not 1 <= batch_size <= self.max_batch_size:
            raise EngineError(f"batch size {batch_size} is not within 1 and the session's {self.max_batch_size}")
        return TransformersState(batch_size)

    def prefill(self, prompts: Sequence[Sequence[int]], state: Any, chunk: int | None = None) -> np.ndarray:
        """Read fresh prompts of equal length; logits float32 [B, N] of the last token. `chunk` must be None."""
        if chunk is not None or state.length:
            raise EngineError("the transformers port cannot read a prompt in chunks")
        if len({len(prompt) for prompt in prompts}) != 1 or len(prompts) != state.batch_size:
            raise EngineError(f"the transformers session takes {state.batch_size} prompts of equal length")
        return self._step(np.array([list(prompt) for prompt in prompts], np.int64), state)

    def decode(self, tokens_B: np.ndarray | Sequence[int], state: Any) -> np.ndarray:
        """One token for every row; logits float32 [B, N]."""
        return self._step(np.asarray(tokens_B, np.int64).reshape(state.batch_size, 1), state)

    def all_logits(self, prompt: Sequence[int], piece: int) -> Iterator[np.ndarray]:
        """Read a fresh prompt whole; logits float32 [P, N] of all its tokens, `piece` tokens at a time, so that few are held at once."""
        ids_BT = np.array([list(prompt)], np.int64)
        self._check(ids_BT, 0)
        with torch.inference_mode(), self._limited_threads():
            hidden_TD = self.model.model(input_ids=torch.from_numpy(ids_BT), use_cache=False).last_hidden_state[0]
            for start in range(0, len(hidden_TD), piece):
                yield self.model.lm_head(hidden_TD[start : start + piece]).float().numpy()

    def _check(self, ids_BT: np.ndarray, past: int) -> None:
        if past + ids_BT.shape[1] > self.max_seq_len:
            raise EngineError(f"{past + ids_BT.shape[1]} tokens exceed the model's {self.max_seq_len}")
        if ids_BT.size == 0 or ids_BT.min() < 0 or ids_BT.max() >= self.vocab_size:
            raise EngineError(f"prompts must be token ids between 0 and {self.vocab_size - 1}")

    def _step(self, ids_BT: np.ndarray, state: TransformersState) -> np.ndarray:
        self._check(ids_BT, state.length)
        # Positions are given because the port counts the past in layer 0, which keeps none.
        positions = torch.arange(state.length, state.length + ids_BT.shape[1])[None].expand(len(ids_BT), -1)
        with torch.inference_mode(), self._limited_threads():
            output = self.model(
                input_ids=torch.from_numpy(ids_BT),
                position_ids=positions,
                past_key_values=state.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        state.cache = output.past_key_values
        state.length += ids_BT.shape[1]
        logits: np.ndarray = output.logits[:, -1].float().numpy()
        return logits

    @contextlib.contextmanager
    def _limited_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self._threads is not None and self._threads != before:
            torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the library's load report and bars off the terminal; what they would say is checked here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
