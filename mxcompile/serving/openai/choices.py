"""Answers in the API's words: choices of a plain response, and pieces of a streamed one."""

from __future__ import annotations

import json
from typing import Any, Protocol

from mxcompile.serving.openai.tools import ToolCalls, ToolUse


class Choice(Protocol):
    """One answer. `values` are what Triton sent: text_output, and token_details and finish_reason where they are."""

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    def pieces(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """What one streamed response adds."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """The answer that came in one response."""


class ChatChoice:
    """Of a chat completion."""

    def __init__(self, index: int, tools: ToolUse) -> None:
        self._index = index
        self._calls = ToolCalls(tools) if tools.expected else None
        self._told = 0  # calls that went out

    def opening(self) -> list[dict[str, Any]]:
        return [self._piece({"role": "assistant", "content": ""})]

    def pieces(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        text, calls, finish = self._read(values)
        logprobs = _chat_logprobs(values)
        delta: dict[str, Any] = {"content": text} if text or self._calls is None else {}
        if calls:
            delta["tool_calls"] = [{"index": self._told + i} | call for i, call in enumerate(calls)]
            self._told += len(calls)
        if not (text or calls or finish or logprobs):
            return []
        return [self._piece(delta, finish, logprobs)]

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        text, calls, finish = self._read(values)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"index": self._index, "message": message, "logprobs": _chat_logprobs(values), "finish_reason": finish}

    def _read(self, values: dict[str, Any]) -> tuple[str, list[dict[str, Any]], str | None]:
        """Text, calls and finish reason, all as far as they are sure."""
        text, finish = values["text_output"], values.get("finish_reason")
        if self._calls is None:
            return text, [], finish
        text, calls = self._calls.feed(text)
        if finish:
            more, late = self._calls.finish()
            text, calls = text + more, calls + late
            if finish == "stop" and self._calls.calls:
                finish = "tool_calls"
        return text, calls, finish

    def _piece(self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class TextChoice:
    """Of a text completion."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._offset = 0

    def opening(self) -> list[dict[str, Any]]:
        return []

    def pieces(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        piece = self.whole(values)
        return [piece] if piece["text"] or piece["finish_reason"] or piece["logprobs"] else []

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        finish = values.get("finish_reason")
        logprobs = self._logprobs(values)
        return {"index": self._index, "text": values["text_output"], "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, values: dict[str, Any]) -> dict[str, Any] | None:
        details = _details(values)
        if details is None:
            return None
        offsets = []
        for entry in details:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in details],
            "token_logprobs": [entry["logprob"] for entry in details],
            "top_logprobs": [None if entry["logprob"] is None else _by_text(entry) for entry in details],
            "text_offset": offsets,
        }


def _details(values: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The entries of token_details; Triton's JSON writes a list of one entry as the entry."""
    details = values.get("token_details")
    if details is None:
        return None
    return [json.loads(entry) for entry in ([details] if isinstance(details, str) else details)]


def _by_text(entry: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities by token text, likeliest first; of two tokens with one text the likelier. The drawn one is
    always there.
    """
    found: dict[str, float] = {}
    for one in [*entry["top"], entry]:
        found.setdefault(one["token"], one["logprob"])
    return found


def _chat_logprobs(values: dict[str, Any]) -> dict[str, Any] | None:
    details = _details(values)
    if details is None:
        return None

    def plain(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: entry[name] for name in ("token", "logprob", "bytes")}

    content = [plain(entry) | {"top_logprobs": [plain(one) for one in entry["top"]]} for entry in details]
    return {"content": content, "refusal": None}


def usage(ends: list[dict[str, Any]], answers: int) -> dict[str, Any]:
    """Token counts out of all answers' last responses; every prompt has `answers` of them and counts once."""
    asked = sum(values["num_input_tokens"] for values in ends) // answers
    cached = sum(min(values["num_cached_tokens"], values["num_input_tokens"]) for values in ends) // answers
    made = sum(values["num_output_tokens"] for values in ends)
    return {
        "prompt_tokens": asked,
        "completion_tokens": made,
        "total_tokens": asked + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
