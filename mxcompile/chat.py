"""The chat text of MiniMax-Text-01, rendered in our own code (reference/minimax01-facts.md, section 6).

Every message is `<beginning_of_sentence>`, a header, a newline, its text, `<end_of_sentence>` and a newline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mxcompile.errors import MxcompileError

BEGIN, END = "<beginning_of_sentence>", "<end_of_sentence>"
HEADERS = {
    "system": "system ai_setting=assistant",
    "user": "user name=user",
    "assistant": "ai name=assistant",
    "function": "system function_response=functions",
}
TOOL_HEADER = "system function_setting=functions"
DEFAULT_SYSTEM = "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model."
"""What the official scripts set when the user sets nothing."""


class ChatError(MxcompileError):
    """A conversation that the template cannot express; names the message."""


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text the model was trained on for a conversation.

    A message is {"role", "content"} with role system, user, assistant or function (which also has a "name"); content
    is a string, or a list of {"type": "text", "text"}. As in the published template, only the first item of a list
    counts, save for the assistant, whose items are joined; and the tools, one block of JSON each, come after all
    messages.
    """
    parts = [_block(*_message(index, message)) for index, message in enumerate(messages)]
    parts += [_block(TOOL_HEADER, _tool(index, tool)) for index, tool in enumerate(tools)]
    if add_generation_prompt:
        parts.append(generation_prompt())
    return "".join(parts)


def opening(system: str | None, text: str) -> list[dict[str, str]]:
    """The messages that open a conversation: the system's (None: the official one, "": none) and the user's."""
    system = DEFAULT_SYSTEM if system is None else system
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def generation_prompt() -> str:
    """The header after which the model answers."""
    return f"{BEGIN}{HEADERS['assistant']}\n"


def next_turn(text: str, *, answer_ended: bool) -> str:
    """What follows an answer in the same sequence: its end (unless the model wrote `<end_of_sentence>` itself, so
    that it is in the sequence already), the user's `text`, and the header of the next answer.
    """
    return ("\n" if answer_ended else f"{END}\n") + render([{"role": "user", "content": text}])


def _block(header: str, text: str) -> str:
    return f"{BEGIN}{header}\n{text}{END}\n"


def _message(index: int, message: Mapping[str, Any]) -> tuple[str, str]:
    role = message.get("role")
    if role not in HEADERS:
        raise ChatError(f"message {index} has role {role!r}; known: {', '.join(HEADERS)}")
    texts = _texts(index, message.get("content"))
    if role == "assistant":
        return HEADERS[role], "".join(texts)
    if role == "function":
        name = message.get("name")
        if not isinstance(name, str) or not name:
            raise ChatError(f"message {index} answers a function call and needs the function's name")
        return HEADERS[role], f'{{"name": "{name}", "response": {texts[0]}}}'
    return HEADERS[role], texts[0]


def _texts(index: int, content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence) or not content:
        raise ChatError(f"message {index} needs content: a string, or a list of text items")
    texts = []
    for item in content:
        if not isinstance(item, Mapping) or item.get("type") != "text" or not isinstance(item.get("text"), str):
            raise ChatError(f"message {index} has a content item that is not text; this model reads text only")
        texts.append(item["text"])
    return texts


def _tool(index: int, tool: Mapping[str, Any]) -> str:
    if not isinstance(tool, Mapping):
        raise ChatError(f"tool {index} must be a JSON object")
    try:
        return json.dumps(tool, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ChatError(f"tool {index} cannot be written as JSON: {error}") from error
