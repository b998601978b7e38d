"""The grammar of answers that call functions, in the published form of the engine's family.

Sources: the function call guides in the models' published repositories; llguidance's docs/syntax.md for the grammar.
"""

from __future__ import annotations

import json
from typing import Any

from mxcompile.chat import M1
from mxcompile.errors import MxcompileError
from mxcompile.guides.library import WHITESPACE, literal
from mxcompile.serving.openai.tools import CALL_MARKS, ToolUse
from mxcompile.tokenizer import FUNCTION_CALL

_FORMS = {
    # What stands before a call's name, before its arguments, after them, between calls, and after the last one.
    "text-01": ("functions.", "(", ")", "\n", "\n```"),
    M1: ('{"name": "', '", "arguments": ', "}", "\n", "\n</tool_calls>"),
}


def tool_grammar(use: ToolUse, family: str, content: dict[str, Any] | None = None) -> str | None:
    """A Lark grammar of what may follow the prompt; None where nothing is asked of it.

    Calls that are forced, and all calls where a function is `strict`, have arguments that follow the function's schema.
    With a schema for the `content`, an answer is either that or calls.
    """
    if not use.expected or not (use.forced or use.strict or content is not None):
        return None
    before, between, after, line, end = _FORMS[M1 if family == M1 else "text-01"]
    rules = [f"args_{i}: %json {_schema(i, each, use)}" for i, each in enumerate(use.definitions)]
    names = [literal(f"{each['name']}{between}") for each in use.definitions]
    rules += [f"call_{i}: {name} args_{i} {literal(after)}" for i, name in enumerate(names)]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(names))))
    more = "" if use.only_first else f" ({literal(line + before)} call)*"
    rules.append(f"calls: call{more} {literal(end)}")
    if use.name:
        index = [each["name"] for each in use.definitions].index(use.name)
        rules.append(f"start: args_{index} {literal(after + end)}")
    elif use.forced:
        rules.append("start: calls")
    else:
        rules += _free(family, before, content, once=use.only_first)
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


def _free(family: str, before: str, content: dict[str, Any] | None, *, once: bool) -> list[str]:
    """Rules of an answer that may call or not."""
    marks = "|".join(CALL_MARKS)
    rules = [f"TEXT: /(?s:.*)/ & ~/(?s:.*)({marks})(?s:.*)/"]
    times = "?" if once else "*"
    if family == M1:
        mark = literal(next(mark for mark in CALL_MARKS if mark != FUNCTION_CALL))
        block = f"{literal(chr(10) + before)} calls"
        if content is None:
            # Lazy: text ends with the first mark, not with the last.
            return [*rules, f"head[lazy]: TEXT {mark}", f"block: {block}", f"start: (head block){times} TEXT"]
        block = f"{mark} {block}"
    else:
        block = f"{FUNCTION_CALL} {literal('```typescript' + chr(10) + before)} calls"
        if content is None:
            return [*rules, f"block: {block}", f"start: TEXT (block TEXT){times}"]
    return [f"block: {block}", f"content: %json {_with_options(content, lenient=False)}", "start: content | block"]


def _schema(index: int, definition: dict[str, Any], use: ToolUse) -> str:
    strict = definition["name"] in use.strict
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    schema = definition.get("parameters") or (nothing if strict else {})
    if not isinstance(schema, dict):
        raise MxcompileError(f"tools.{index}: parameters must be a JSON schema")
    return _with_options({"type": "object"} | schema, lenient=not strict)


def _with_options(schema: dict[str, Any], *, lenient: bool) -> str:
    """`lenient`: what the library cannot check is left to the model, as it was said not to be strict."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return json.dumps({"x-guidance": options} | schema, ensure_ascii=False)
