"""Requests of the OpenAI API that can be honoured here. A field that is not listed is refused, never ignored."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mxcompile.chat import render
from mxcompile.errors import MxcompileError
from mxcompile.serving.openai.content import plain_messages, refuse_images
from mxcompile.serving.openai.response_format import (
    GuideFields,
    ResponseFormat,
    StructuredOutputs,
    content_schema,
    guide_fields,
)
from mxcompile.serving.openai.tool_grammar import tool_grammar
from mxcompile.serving.openai.tools import ToolUse, conversation, tool_use

NO_LIMIT = 2**31 - 1  # the engine stops at its own length
COMPLETION_TOKENS = 16  # what the API does without max_tokens
MOST_PROMPTS = 128

# Fields that ask for nothing when they have one of these values. With others they are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# What is said of a field that is refused; the others are "not supported here".
REASONS = {
    "audio": "this model reads and writes text only",
    "best_of": "only 1 is supported; ask for n answers with logprobs and choose among them",
    "function_call": "not supported here; use tool_choice",
    "functions": "not supported here; use tools",
    "modalities": 'only ["text"]: this model reads and writes text only',
    "reasoning_effort": "this model has no setting for it",
    "store": "nothing is stored here",
    "suffix": "this model cannot fill in the middle of a text",
    "verbosity": "this model has no setting for it",
}

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=NO_LIMIT)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take. `top_k`, `repetition_penalty`, `ignore_eos` and `structured_outputs` are additions to the
    API, as is `response_format` for text completions.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] | None = 0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: dict[int, Bias] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False  # go on behind an end of sequence, as far as max_tokens
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    user: str | None = None  # whom to be fair to
    safety_identifier: str | None = None  # the new name of `user`
    prompt_cache_key: str | None = None  # a hint where to look; prefixes are found by their tokens here

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in NEUTRAL or value not in NEUTRAL[name]}

    @property
    def client(self) -> str:
        """Who asks, as far as the body says."""
        return self.safety_identifier or self.user or ""

    @property
    def answers(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def guide_field(self) -> str:
        """The field that says what answers must follow."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def guide(self) -> GuideFields | None:
        """What the text of an answer must follow, by both fields that say so."""
        wanted = self.response_format.guide() if self.response_format is not None else None
        if self.structured_outputs is None:
            return wanted
        if wanted is not None:
            raise MxcompileError("structured_outputs: give this or response_format, not both")
        return self.structured_outputs.guide()

    @abstractmethod
    def requests(self, family: str, images: bool) -> list[dict[str, Any]]:
        """The fields of Triton's generate request for each prompt. `family` of the model as its configuration has it; `images`:
        whether the engine takes any.
        """

    def settings(self) -> dict[str, Any]:
        """Those of them that neither prompt nor length are part of."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        values: dict[str, Any] = {
            "stream": self.stream,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "seed": secrets.randbits(63) if self.seed is None else self.seed % 2**64,
        }
        others = {
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        values |= {name: getattr(self, name) for name, off in others.items() if getattr(self, name) not in (None, off)}
        values |= {"n": self.answers} if self.answers > 1 else {}
        values |= {"end_id": -1} if self.ignore_eos else {}
        if self.logit_bias:
            values |= {"logit_bias_ids": list(self.logit_bias), "logit_bias_values": list(self.logit_bias.values())}
        if self.guide is not None:
            values |= guide_fields(*self.guide)
        return values | ({"stop_words": stops} if stops else {})


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def guide_field(self) -> str:
        return "tools" if self.tools and self.tool_choice != "none" else super().guide_field

    def tool_use(self, family: str) -> ToolUse:
        """What is said of tools."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls, family)

    def requests(self, family: str, images: bool) -> list[dict[str, Any]]:
        """One request, with the conversation as the model was trained on it."""
        tools = self.tool_use(family)
        messages, shown = self.messages, list[str]()
        if images:
            messages, shown = plain_messages(messages)
        else:
            refuse_images(messages)
        text = render(conversation(messages, family), tools.definitions, family=family)
        values = self.settings() | {
            "text_input": text + tools.forced,
            "max_tokens": self.max_completion_tokens or self.max_tokens or NO_LIMIT,
        }
        if self.top_logprobs is not None and not self.logprobs:
            raise MxcompileError("top_logprobs: needs logprobs: true")
        values |= {"images": shown} if shown else {}
        content = content_schema(self.guide) if tools.expected and not tools.forced and self.guide is not None else None
        if (grammar := tool_grammar(tools, family, content)) is not None:
            values |= guide_fields("grammar", grammar)
        return [values | ({"top_log_probs": self.top_logprobs or 0} if self.logprobs else {})]


class CompletionBody(Common):
    """POST /v1/completions. `session_id` and `session_start` are additions of this server."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Count | None = COMPLETION_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    session_id: str | None = None
    session_start: bool = False

    def requests(self, family: str, images: bool) -> list[dict[str, Any]]:
        """A request for each prompt."""
        prompts: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise MxcompileError(f"prompt: give 1 to {MOST_PROMPTS} of them, not {len(prompts)}")
        more: dict[str, Any] = {"max_tokens": self.max_tokens or COMPLETION_TOKENS}
        if self.echo:
            more |= {"echo": True} | ({"prompt_log_probs": True} if self.logprobs is not None else {})
        if self.logprobs is not None:
            more["top_log_probs"] = self.logprobs
        if self.session_id is not None:
            if len(prompts) > 1:
                raise MxcompileError("session_id: a session takes one prompt at a time")
            more |= {"session_id": self.session_id, "session_start": self.session_start}
        found = []
        for prompt in prompts:
            name = "text_input" if isinstance(prompt, str) else "input_ids"
            found.append(self.settings() | more | {name: prompt})
        return found
