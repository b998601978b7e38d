"""Requests of the OpenAI API that can be honoured here. A field that is not listed is refused, never ignored."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mxcompile.chat import render
from mxcompile.errors import MxcompileError

NO_LIMIT = 2**31 - 1  # the engine stops at its own length
COMPLETION_TOKENS = 16  # what the API does without max_tokens
ONE_PROMPT = "give one prompt per request: a text, or a list of token ids"


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. `top_k` and `repetition_penalty` are additions of this server."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] | None = 0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = 1
    user: str | None = None  # a name for the client's own use; nothing depends on it

    def tensors(self) -> dict[str, Any]:
        """The fields of Triton's generate request, without prompt and length."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        values: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": self.top_k or 0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": secrets.randbits(63) if self.seed is None else self.seed,
        }
        return values | ({"stop_words": stops} if stops else {})


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=NO_LIMIT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=NO_LIMIT)] | None = None

    def tensors(self) -> dict[str, Any]:
        """As above, with the conversation as the model was trained on it."""
        limit = self.max_completion_tokens or self.max_tokens or NO_LIMIT
        return super().tensors() | {"text_input": render(self.messages), "max_tokens": limit}


class CompletionBody(Common):
    """POST /v1/completions. `session_id` and `session_start` are additions of this server."""

    prompt: str | list[int] | list[str]
    max_tokens: Annotated[int, Field(ge=1, le=NO_LIMIT)] | None = COMPLETION_TOKENS
    session_id: str | None = None
    session_start: bool = False

    def tensors(self) -> dict[str, Any]:
        values = super().tensors() | {"max_tokens": self.max_tokens or COMPLETION_TOKENS}
        if isinstance(self.prompt, str):
            values["text_input"] = self.prompt
        elif len(self.prompt) == 1 and isinstance(self.prompt[0], str):
            values["text_input"] = self.prompt[0]
        elif self.prompt and all(isinstance(part, int) for part in self.prompt):
            values["input_ids"] = self.prompt
        else:
            raise MxcompileError(ONE_PROMPT)
        if self.session_id is not None:
            values |= {"session_id": self.session_id, "session_start": self.session_start}
        return values
