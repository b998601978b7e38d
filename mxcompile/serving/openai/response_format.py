"""What a body says its answers must follow: `response_format`, and `structured_outputs` as vLLM names its addition."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mxcompile.errors import MxcompileError
from mxcompile.guides.guide import KINDS
from mxcompile.serving.guided import KIND, TEXT
from mxcompile.serving.openai.triton import ApiError

GuideFields = tuple[str, str]
"""Kind and text of a guide (see mxcompile.guides)."""


def guide_fields(kind: str, text: str) -> dict[str, str]:
    """A guide as fields of Triton's generate request."""
    return {KIND: kind} | ({TEXT: text} if text else {})


def content_schema(guide: GuideFields) -> dict[str, Any]:
    """The schema that answers follow which may also be calls of functions. Raises MxcompileError where there is none."""
    kind, text = guide
    if kind == "json":
        return {"type": "object"}
    if kind != "json_schema":
        raise MxcompileError(f"structured_outputs: {kind} does not go with tools; set tool_choice to none")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise MxcompileError("structured_outputs: json must be a JSON object")
    return schema


def blamed(error: ApiError, field: str) -> ApiError:
    """What is said of a guide that cannot be followed, by the name of the `field` that it came from."""
    kind, colon, reason = error.message.partition(": ")
    return ApiError(400, f"{field}: {reason}", field) if error.status == 400 and colon and kind in KINDS else error


class JsonSchema(BaseModel):
    """Whether it is `strict` makes no difference: an answer follows the schema in any case."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema"')
        return self

    def guide(self) -> GuideFields | None:
        """None where any text will do."""
        if self.json_schema is not None:
            return "json_schema", json.dumps(self.json_schema.schema_, ensure_ascii=False)
        return ("json", "") if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """One of these."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def guide(self) -> GuideFields:
        """Of the one that is given."""
        found: list[GuideFields] = []
        if self.json_ is not None:
            text = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_, ensure_ascii=False)
            found.append(("json_schema", text))
        if self.json_object:
            found.append(("json", ""))
        if self.choice is not None:
            found.append(("choice", json.dumps(self.choice, ensure_ascii=False)))
        found += [(name, text) for name in ("regex", "grammar") if (text := getattr(self, name)) is not None]
        (one,) = found
        return one

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        values = (self.json_, self.json_object or None, self.regex, self.choice, self.grammar)
        if sum(value is not None for value in values) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self
