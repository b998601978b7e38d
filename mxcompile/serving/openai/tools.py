"""Tools of the OpenAI API in the words of MiniMax's models: what goes into the prompt, and calls in the answer.

MiniMax-Text-01 calls with the special token `<function_call>` and a fenced block of `functions.NAME(JSON)` lines;
MiniMax-M1 with `{"name": ..., "arguments": ...}` lines between `<tool_calls>` and `</tool_calls>`. Both are read; written
is what the family of the engine's model writes. Sources: the function call guides in the models' published repositories.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mxcompile.chat import M1
from mxcompile.errors import MxcompileError
from mxcompile.tokenizer import FUNCTION_CALL

_FENCE = "```typescript\n"
_M1_BEGIN, _M1_END = "<tool_calls>", "</tool_calls>"
CALL_MARKS = (FUNCTION_CALL, _M1_BEGIN)
_CALL = re.compile(r"functions\.([\w.-]+)\(\s*")
_LONGEST_NAME = 64
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools. `definitions` go into the prompt; `forced` is what the answer must begin with, and
    `name` the function that this names. Calls of `strict` functions follow their schema also where nothing is forced.
    """

    definitions: list[dict[str, Any]] = field(default_factory=list)
    forced: str = ""
    only_first: bool = False
    name: str = ""
    strict: frozenset[str] = frozenset()

    @property
    def expected(self) -> bool:
        """Whether calls may be in the answer."""
        return bool(self.definitions)


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None, family: str = "text-01"
) -> ToolUse:
    """The request's `tools`, `tool_choice` and `parallel_tool_calls`. Raises MxcompileError for what is none."""
    definitions = [_definition(index, tool) for index, tool in enumerate(tools or ())]
    # It says nothing to the model.
    strict = frozenset(each["name"] for each in definitions if each.pop("strict", None))
    if choice is None:
        choice = "auto" if definitions else "none"
    if not definitions and choice != "none":
        raise MxcompileError("tool_choice: give tools to choose from")
    only_first = parallel is False
    if choice == "none":
        return ToolUse()
    if choice == "auto":
        return ToolUse(definitions, "", only_first, strict=strict)
    opening = f'{_M1_BEGIN}\n{{"name": "' if family == M1 else f"{FUNCTION_CALL}{_FENCE}functions."
    if choice == "required":
        return ToolUse(definitions, opening, only_first, strict=strict)
    wanted = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    if not isinstance(name, str):
        raise MxcompileError(
            'tool_choice: "none", "auto", "required" or {"type": "function", "function": {"name": ...}} are known'
        )
    if name not in [definition["name"] for definition in definitions]:
        raise MxcompileError(f"tool_choice: there is no tool {name!r}")
    closing = '", "arguments": ' if family == M1 else "("
    return ToolUse(definitions, f"{opening}{name}{closing}", only_first, name, strict)


def _definition(index: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function") if tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise MxcompileError(f'tools.{index}: must be {{"type": "function", "function": {{...}}}}')
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(rf"[\w-]{{1,{_LONGEST_NAME}}}", name):
        raise MxcompileError(
            f"tools.{index}: a name must have up to {_LONGEST_NAME} letters, digits, underscores and dashes"
        )
    return dict(function)


def conversation(messages: Sequence[Mapping[str, Any]], family: str = "text-01") -> list[dict[str, Any]]:
    """Messages of the OpenAI API as `mxcompile.chat.render` takes them.

    A `developer` speaks as the system; calls of the assistant are written as the model writes them; an answer of a
    `tool` becomes one of a `function`, with the name that its call had.
    """
    names: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role == "developer":
            message = {**message, "role": "system"}
        elif role == "assistant" and message.get("tool_calls"):
            lines = "\n".join(_said(index, call, names, family) for call in message["tool_calls"])
            text = f"{_M1_BEGIN}\n{lines}\n{_M1_END}" if family == M1 else f"{FUNCTION_CALL}{_FENCE}{lines}\n```"
            said = message.get("content") or []
            said = [{"type": "text", "text": said}] if isinstance(said, str) else list(said)
            message = {"role": role, "content": [*said, {"type": "text", "text": text}]}
        elif role == "tool":
            name = names.get(message.get("tool_call_id", ""))
            if name is None:
                raise MxcompileError(f"message {index} answers a tool call that no message before it makes")
            message = {"role": "function", "name": name, "content": message.get("content")}
        if message.get("role") == "function" and family != M1:
            message = {**message, "content": _as_json(message.get("content"))}
        found.append(dict(message))
    return found


def _said(index: int, call: Any, names: dict[str, str], family: str) -> str:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise TypeError
        names[str(call["id"])] = name
    except (KeyError, TypeError):
        raise MxcompileError(f"message {index} has a tool call without id, name and arguments") from None
    if family == M1:
        return f'{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}'
    return f"functions.{name}({arguments or '{}'})"


def _as_json(content: Any) -> Any:
    """The template writes a function's answer into JSON: text that is not JSON itself becomes a JSON string."""
    if isinstance(content, Sequence) and not isinstance(content, str) and content:
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        return content  # `render` says what is wrong with it
    try:
        json.loads(content)
    except ValueError:
        return json.dumps(content, ensure_ascii=False)
    return content


class ToolCalls:
    """Parts an answer into text and calls, as it comes. How it is cut into pieces changes neither."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._rest = use.forced
        self._inside = ""  # the mark that opened the calls being read, or ""
        self._block_calls = 0
        self.calls: list[dict[str, Any]] = []

    def feed(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """Add text; returns what is sure by now: plain text, and calls {"id", "type", "function"} that are whole."""
        self._rest += piece
        text, before = "", len(self.calls)
        while True:
            if self._inside:
                if not self._read_calls():
                    break
            else:
                at = min((i for i in map(self._rest.find, CALL_MARKS) if i >= 0), default=-1)
                if at < 0:
                    sure = len(self._rest) - self._forming()
                    text, self._rest = text + self._rest[:sure], self._rest[sure:]
                    break
                text += self._rest[:at]
                self._inside = next(mark for mark in CALL_MARKS if self._rest.startswith(mark, at))
                self._block_calls = 0
                self._rest = self._rest[at + len(self._inside) :]
        return text, self._keep(before)

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left when no more comes: text that looked like the beginning of a call, but is none."""
        before, rest = len(self.calls), self._rest
        self._rest = ""
        if not self._inside:
            return rest, []
        if self._use.name and not self.calls:
            # The name was asked for and is sure; that the arguments are no JSON is for the client to see.
            arguments = (self._inside + rest).removeprefix(self._use.forced)
            for end in (_M1_END, "}") if self._inside == _M1_BEGIN else ("```", ")"):
                arguments = arguments.rstrip().removesuffix(end)
            self._add(self._use.name, arguments)
            return "", self._keep(before)
        if self._block_calls:
            return "", []  # a block that was not closed
        whole = self._inside + rest
        return whole.removeprefix(self._use.forced) if not self.calls else whole, []

    def _keep(self, before: int) -> list[dict[str, Any]]:
        if self._use.only_first:
            del self.calls[1:]
        return self.calls[before:]

    def _read_calls(self) -> bool:
        """Read whole calls off the front; True when the block has ended."""
        while True:
            rest, end = self._rest.lstrip(), _M1_END
            if self._inside == FUNCTION_CALL:
                rest, end = rest.removeprefix(_FENCE.rstrip()).lstrip(), "```"
            if rest.startswith(end) and (self._block_calls or end == _M1_END):
                self._rest, self._inside = rest[len(end) :], ""
                return True
            try:
                if self._inside == _M1_BEGIN:
                    call, used = _decoder.raw_decode(rest)
                    self._add(str(call["name"]), json.dumps(call.get("arguments", {}), ensure_ascii=False))
                else:
                    head = _CALL.match(rest)
                    if head is None:
                        return False
                    _, used = _decoder.raw_decode(rest, head.end())
                    close = re.compile(r"\s*\)").match(rest, used)
                    if close is None:
                        return False
                    self._add(head.group(1), rest[head.end() : used])
                    used = close.end()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return False  # more may come
            self._rest = rest[used:]
            self._block_calls += 1

    def _add(self, name: str, arguments: str) -> None:
        call = {"name": name, "arguments": arguments}
        self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call})

    def _forming(self) -> int:
        """Length of the longest end of the text that may become a mark."""
        longest = max(len(mark) for mark in CALL_MARKS) - 1
        for length in range(min(longest, len(self._rest)), 0, -1):
            if any(mark.startswith(self._rest[len(self._rest) - length :]) for mark in CALL_MARKS):
                return length
        return 0
