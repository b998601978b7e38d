"""Tool calls: what goes into the prompt, what is read out of an answer, and the application over a scripted Triton."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.chat import render
from mxcompile.errors import MxcompileError
from mxcompile.serving.openai.tools import ToolCalls, ToolUse, conversation, tool_use

WEATHER = {"name": "get_weather", "description": "Now.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": WEATHER}]
AUTO = ToolUse([WEATHER])


def read(use, pieces):
    """Text and calls of an answer that comes in pieces."""
    parser, text, calls = ToolCalls(use), "", []
    for part, found in [*(parser.feed(piece) for piece in pieces), parser.finish()]:
        text += part
        calls += [(call["function"]["name"], call["function"]["arguments"]) for call in found]
    return text, calls


# Answer, what is text in it, and its calls. The first two are the examples of the published guides.
ANSWERS = [
    (
        '<function_call>```typescript\nfunctions.get_current_weather({"location": "Shanghai"})\n```',
        "",
        [("get_current_weather", '{"location": "Shanghai"}')],
    ),
    (
        '<think>\nI will search.\n</think>\n<tool_calls>\n{"name": "search_web", "arguments": {"query": ["a \\"b\\""]}}\n'
        '{"name": "search_web", "arguments": {"query": ["é"]}}\n</tool_calls>',
        "<think>\nI will search.\n</think>\n",
        [("search_web", '{"query": ["a \\"b\\""]}'), ("search_web", '{"query": ["é"]}')],
    ),
    (
        'Two: <function_call>```typescript\nfunctions.a({"x": "(1) ```"})\nfunctions.b({})\n``` done',
        "Two:  done",
        [("a", '{"x": "(1) ```"}'), ("b", "{}")],
    ),
    ("no call at all, only <function and <tool_ca", "no call at all, only <function and <tool_ca", []),
    ("<function_call>nothing follows", "<function_call>nothing follows", []),
    (
        '<function_call>```typescript\nfunctions.a({"x": ',
        '<function_call>```typescript\nfunctions.a({"x": ',
        [],
    ),
    ("<tool_calls>\n[1, 2]\n</tool_calls>", "<tool_calls>\n[1, 2]\n</tool_calls>", []),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ANSWERS), st.data())
def test_calls_do_not_depend_on_the_cuts(answer, data):
    whole, text, calls = answer
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(AUTO, pieces) == (text, calls)


def test_text_that_is_no_mark_is_not_held():
    parser = ToolCalls(AUTO)
    assert [parser.feed(piece)[0] for piece in ("a <", "b", "<tool_", "x")] == ["a ", "<b", "", "<tool_x"]


@pytest.mark.parametrize(
    ("choice", "answer", "expected"),
    [
        ({"type": "function", "function": {"name": "get_weather"}}, '{"a": 1})\n```', [("get_weather", '{"a": 1}')]),
        ({"type": "function", "function": {"name": "get_weather"}}, '{"a": )\n```', [("get_weather", '{"a": ')]),
        ("required", 'get_weather({"a": 1})\n```', [("get_weather", '{"a": 1}')]),
    ],
)
def test_a_forced_call_begins_in_the_prompt(choice, answer, expected):
    use = tool_use(TOOLS, choice, None)
    assert use.forced.startswith("<function_call>```typescript\nfunctions.")
    assert read(use, list(answer)) == ("", expected)


@pytest.mark.parametrize(
    ("choice", "answer", "expected"),
    [
        (
            {"type": "function", "function": {"name": "get_weather"}},
            '{"a": 1}}\n</tool_calls>',
            [("get_weather", '{"a": 1}')],
        ),
        (
            {"type": "function", "function": {"name": "get_weather"}},
            '{"a": }\n</tool_calls>',
            [("get_weather", '{"a": ')],
        ),
        ("required", 'get_weather", "arguments": {"a": 1}}\n</tool_calls>', [("get_weather", '{"a": 1}')]),
    ],
)
def test_a_forced_call_of_m1_begins_in_the_prompt(choice, answer, expected):
    use = tool_use(TOOLS, choice, None, "m1")
    assert use.forced.startswith('<tool_calls>\n{"name": "')
    assert read(use, list(answer)) == ("", expected)


def test_a_required_call_that_does_not_come_is_text():
    assert read(tool_use(TOOLS, "required", None), ["no idea"]) == ("no idea", [])


def test_only_the_first_call_where_calls_may_not_be_parallel():
    use = tool_use(TOOLS, None, False)
    assert read(use, ANSWERS[1][0]) == (ANSWERS[1][1], ANSWERS[1][2][:1])


def test_what_is_said_of_tools():
    assert tool_use(None, None, None) == ToolUse()
    assert tool_use(TOOLS, "none", None) == ToolUse()
    assert tool_use(TOOLS, None, None) == AUTO
    strict = [{"type": "function", "function": WEATHER | {"strict": True}}]
    assert tool_use(strict, None, None) == ToolUse([WEATHER], strict=frozenset({"get_weather"}))
    assert tool_use([{"type": "function", "function": WEATHER | {"strict": False}}], None, None) == AUTO
    for choice in ("always", {"type": "allowed_tools"}, {"type": "function"}):
        with pytest.raises(MxcompileError, match="tool_choice"):
            tool_use(TOOLS, choice, None)


def test_a_conversation_with_calls_in_the_words_of_the_template():
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Bern"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "And in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": 'it is "fine"'},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 21}'},
    ]
    assert render(conversation(messages, "m1"), [WEATHER], family="m1") == (
        "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n"
        "<beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
        '{"name": "get_weather", "description": "Now.", "parameters": {"type": "object"}}\n</tools>\n\n'
        "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and "
        "json-object of arguments, following the format below:\n<tool_calls>\n"
        '{"name": <tool-name>, "arguments": <args-json-object>}\n...\n</tool_calls><end_of_sentence>\n'
        "<beginning_of_sentence>user name=user\nAnd in Bern?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n<tool_calls>\n"
        '{"name": "get_weather", "arguments": {"place": "Bern"}}\n</tool_calls><end_of_sentence>\n'
        '<beginning_of_sentence>tool name=tools\ntool name: get_weather\ntool result: it is "fine"\n\n'
        'tool name: get_weather\ntool result: {"degrees": 21}\n\n<end_of_sentence>\n'
        "<beginning_of_sentence>ai name=assistant\n"
    )
    assert render(conversation(messages), [WEATHER]) == (
        "<beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nAnd in Bern?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n<function_call>```typescript\n"
        'functions.get_weather({"place": "Bern"})\n```<end_of_sentence>\n'
        "<beginning_of_sentence>system function_response=functions\n"
        '{"name": "get_weather", "response": "it is \\"fine\\""}<end_of_sentence>\n'
        "<beginning_of_sentence>system function_response=functions\n"
        '{"name": "get_weather", "response": {"degrees": 21}}<end_of_sentence>\n'
        "<beginning_of_sentence>system function_setting=functions\n"
        '{"name": "get_weather", "description": "Now.", "parameters": {"type": "object"}}<end_of_sentence>\n'
        "<beginning_of_sentence>ai name=assistant\n"
    )


@pytest.mark.parametrize(
    "call", [{}, {"id": "a", "function": {"name": "f"}}, {"id": "a", "function": {"name": "f", "arguments": {}}}, 3]
)
def test_malformed_calls_in_a_conversation_are_named(call):
    with pytest.raises(MxcompileError, match="message 0 has a tool call without"):
        conversation([{"role": "assistant", "tool_calls": [call]}])


class ScriptedTriton(BaseHTTPRequestHandler):
    """Answers generate_stream with the text that the class holds, in pieces of three characters; "?" with what makes no sense."""

    answer = ""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        size = 3 if asked["stream"] else max(len(self.answer), 1)
        pieces = [self.answer[at : at + size] for at in range(0, len(self.answer), size)]
        self.send_response(200)
        self.end_headers()
        for index, piece in enumerate(pieces):
            values = {"text_output": piece}
            if index == len(pieces) - 1:
                counts = {"num_input_tokens": 9, "num_output_tokens": 5, "num_cached_tokens": 0}
                values |= {"finish_reason": "stop"} | counts
            self.wfile.write(f"data: {json.dumps(values if piece != '?' else {'finish_reason': 'odd'})}\n\n".encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def scripted():
    """The `openai` client, over the application, over a Triton that says what `ScriptedTriton.answer` is set to."""
    openai = pytest.importorskip("openai")
    from served import free_ports

    from mxcompile.serving.openai.server import FrontServer

    triton = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedTriton)
    threading.Thread(target=triton.serve_forever, daemon=True).start()
    address, (port,) = f"http://127.0.0.1:{triton.server_port}", free_ports(1)
    with (
        FrontServer("127.0.0.1", port, address, address, "scripted", 1),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    triton.shutdown()


def test_errors_of_the_application_itself(scripted):
    """Unknown places, and an answer of Triton's that makes no sense: JSON with a name, and no traceback."""
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        scripted.embeddings.create(model="scripted", input="a")
    ScriptedTriton.answer = ""  # no response at all
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="the engine server ended"):
            list(scripted.completions.create(model="scripted", prompt="a", stream=stream))
    ScriptedTriton.answer = "?"
    with pytest.raises(openai.InternalServerError) as failed:
        scripted.completions.create(model="scripted", prompt="a", extra_headers={"X-Request-Id": "odd-one"})
    assert "which its log calls odd-one" in failed.value.body["message"]
    assert failed.value.response.headers["x-request-id"] == "odd-one"


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_client_sees_calls(scripted, answer):
    ScriptedTriton.answer, text, calls = answer
    asked = dict(model="scripted", messages=[{"role": "user", "content": "?"}], tools=TOOLS)
    made = scripted.chat.completions.create(**asked).choices[0]
    assert made.message.content == (text or None if calls else text)
    assert [(c.function.name, c.function.arguments) for c in made.message.tool_calls or []] == calls
    assert made.finish_reason == ("tool_calls" if calls else "stop")
    choices = [chunk.choices[0] for chunk in scripted.chat.completions.create(**asked, stream=True)]
    assert "".join(choice.delta.content or "" for choice in choices) == text
    streamed = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [(c.function.name, c.function.arguments) for c in streamed] == calls
    assert [c.index for c in streamed] == list(range(len(calls)))
    assert choices[-1].finish_reason == made.finish_reason
    untold = scripted.chat.completions.create(**asked | {"tool_choice": "none"}).choices[0]
    assert untold.message.content == ScriptedTriton.answer, "who expects no call gets the text"
