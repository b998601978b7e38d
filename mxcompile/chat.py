"""The chat text of MiniMax's models, rendered in our own code (reference/minimax01-facts.md, section 6).

Text-01 and VL-01 share a template. M1 has another: it opens the document, puts what the system says first, then all tools in
one block, and gives the answers of tools a header of their own (its published tokenizer_config.json; the words about
tools are those of its function call guide, where the two differ).

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
M1 = "m1"  # the family whose template differs
M1_BEGIN, M1_TOOLS_HEADER, M1_RESULT_HEADER = "<begin_of_document>", "system tool_setting=tools", "tool name=tools"
_M1_TOOLS = """You are provided with these tools:
<tools>
{}
</tools>

If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and json-object \
of arguments, following the format below:
<tool_calls>
{{"name": <tool-name>, "arguments": <args-json-object>}}
...
</tool_calls>"""
DEFAULT_SYSTEM = "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model."
"""What the official scripts set when the user sets nothing."""
M1_DEFAULT_SYSTEM = "You are a helpful assistant created by MiniMax based on MiniMax-M1 model."


class ChatError(MxcompileError):
    """A conversation that the template cannot express; names the message."""


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
    family: str = "text-01",
) -> str:
    """The text the model was trained on for a conversation. `family`: as the engine's configuration names it.

    A message is {"role", "content"} with role system, user, assistant or function (which also has a "name"); content
    is a string, or a list of {"type": "text", "text"}. As in the published template, only the first item of a list
    counts, save for the assistant, whose items are joined; and the tools, one block of JSON each, come after all
    messages (M1: in one block before them).
    """
    if family == M1:
        return _render_m1(messages, tools, add_generation_prompt)
    parts = [_block(*_message(index, message)) for index, message in enumerate(messages)]
    parts += [_block(TOOL_HEADER, _tool(index, tool)) for index, tool in enumerate(tools)]
    if add_generation_prompt:
        parts.append(generation_prompt())
    return "".join(parts)


def _render_m1(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], go_on: bool) -> str:
    system, parts, results = "", [], ""
    for index, message in enumerate(messages):
        header, text = _message(index, message)
        if results and message["role"] != "function":
            parts.append(_block(M1_RESULT_HEADER, results))
            results = ""
        if message["role"] == "system":
            system += text
        elif message["role"] == "function":  # answers to the calls of one message stand in one block
            results += f"tool name: {message['name']}\ntool result: {_texts(index, message['content'])[0]}\n\n"
        else:
            parts.append(_block(header, text))
    if results:
        parts.append(_block(M1_RESULT_HEADER, results))
    if tools:
        lines = "\n".join(_tool(index, tool) for index, tool in enumerate(tools))
        parts.insert(0, _block(M1_TOOLS_HEADER, _M1_TOOLS.format(lines)))
    if system:
        parts.insert(0, _block(HEADERS["system"], system))
    return M1_BEGIN + "".join(parts) + (generation_prompt() if go_on else "")


def opening(system: str | None, text: str, *, family: str = "text-01") -> list[dict[str, str]]:
    """The messages that open a conversation: the system's (None: the official one, "": none) and the user's."""
    if system is None:
        system = M1_DEFAULT_SYSTEM if family == M1 else DEFAULT_SYSTEM
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
