"""An engine as Python users hold it: the session, its tokenizer, and generation bound to both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from engines import load as load_session
from engines.config import EngineConfig
from engines.generation import Generation, GenerationConfig, GenerationResult, TokenEvent
from engines.interface import Session, State, StepResult
from mxcompile.errors import MxcompileError
from mxcompile.guides import Guide
from mxcompile.guides.compiler import GuideCompiler
from mxcompile.image_prompts import ImageSource, with_images
from mxcompile.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """A session and what belongs to it. `tokenizer` is None when the engine was built without one.

    Legend: B batch, T new tokens, N vocabulary.
    """

    session: Session
    tokenizer: Tokenizer | None

    @property
    def config(self) -> EngineConfig:
        """What the engine was built as."""
        return self.session.config

    @property
    def max_seq_len(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return self.session.max_seq_len

    @property
    def max_batch_size(self) -> int:
        """Most sequences in one batch."""
        return self.session.max_batch_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence: the tokenizer's, else the model configuration's."""
        if self.tokenizer is not None and self.tokenizer.eos_token_ids:
            return self.tokenizer.eos_token_ids
        eos = self.config.model.get("eos_token_id")
        return () if eos is None else (int(eos),)

    @property
    def family(self) -> str:
        """Which published model this is one of: "text-01", "m1" or "vl-01"; it decides the chat's text."""
        return str(self.config.model.get("family", "text-01"))

    @cached_property
    def guides(self) -> GuideCompiler:
        """What makes the constraints of answers that must follow a schema, an expression or a grammar."""
        return GuideCompiler(self.tokenizer, self.session.vocab_size)

    def new_state(self, batch_size: int) -> State:
        """Buffers for `batch_size` empty sequences."""
        return self.session.new_state(batch_size)

    def prefill(self, prompts: Sequence[Sequence[int]], state: State, chunk: int | None = None) -> NDArray[np.float32]:
        """Append tokens to each row; logits [B, N] of each row's last token (see `engines.interface.Session`)."""
        return self.session.prefill(prompts, state, chunk)

    def decode(self, tokens_B: NDArray[Any] | Sequence[int], state: State) -> NDArray[np.float32]:
        """One token for every row; logits [B, N] (see `engines.interface.Session`)."""
        return self.session.decode(tokens_B, state)

    def forward(self, ids_BT: NDArray[Any], new_lengths_B: NDArray[Any], state: State, **how: Any) -> StepResult:
        """The primitive step (see `engines.interface.Session`)."""
        return self.session.forward(ids_BT, new_lengths_B, state, **how)

    @overload
    def generate(
        self, prompts: str, on_token: Callable[[TokenEvent], None] | None = ..., **settings: Any
    ) -> GenerationResult: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], on_token: Callable[[TokenEvent], None] | None = ..., **settings: Any
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        on_token: Callable[[TokenEvent], None] | None = None,
        **settings: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Generate for one text, or for a list of texts or token lists.

        `settings` are those of `GenerationConfig`; stop_token_ids defaults to the model's end of sequence. Answers follow
        `guide`, a `mxcompile.guides.Guide`, if there is one (raises GuideError when they cannot).
        `prefill_chunk` overrides the engine's. `images` are those that one text is about (paths, bytes or PIL images), in the
        order of its `<image>` marks, or a list of them for each prompt. Raises GenerationError for what cannot be honoured,
        EngineError for an image that cannot be read.
        """
        one = isinstance(prompts, str)
        if one and settings.get("images") is not None:
            settings["images"] = [settings["images"]]
        generation = self.start([prompts] if isinstance(prompts, str) else prompts, **settings)
        for event in generation:
            if on_token is not None:
                on_token(event)
        results = generation.results()
        return results[0] if one else results

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        state: State | None = None,
        prefill_chunk: int | None = None,
        images: Sequence[Sequence[ImageSource]] | None = None,
        guide: Guide | None = None,
        **settings: Any,
    ) -> Generation:
        """As `generate`, as an iterator over tokens; leaving it early stops the work."""
        settings.setdefault("stop_token_ids", self.eos_token_ids)
        if guide is not None:
            settings["constraint"] = self.guides.compile(guide)
        ids = [self.tokens(prompt) for prompt in prompts]
        ids, prepared = with_images(self.config, prompts, ids, images)
        return Generation(
            self.session,
            ids,
            GenerationConfig.from_dict(settings),
            detokenizer=self.tokenizer.detokenizer if self.tokenizer is not None else None,
            state=state,
            prefill_chunk=prefill_chunk,
            images=prepared,
        )

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a text; a token list stays as it is. Raises MxcompileError for text without a tokenizer."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise MxcompileError("this engine has no tokenizer; give token ids instead of text")
        return self.tokenizer.encode(prompt)


def load(engine_dir: str | Path, **options: Any) -> LoadedEngine:
    """Open a built engine. `options` are those of `engines.load`. Raises EngineError when it is damaged or cannot run
    here.
    """
    return LoadedEngine(load_session(engine_dir, **options), Tokenizer.find(engine_dir))


def generate(
    engine: LoadedEngine | str | Path, prompts: str | Sequence[Prompt], **settings: Any
) -> GenerationResult | list[GenerationResult]:
    """`LoadedEngine.generate` of an engine, or of the engine in a folder."""
    loaded = engine if isinstance(engine, LoadedEngine) else load(engine)
    return loaded.generate(prompts, **settings)
