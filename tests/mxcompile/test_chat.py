"""The chat text, against strings written out by the rules of reference/minimax01-facts.md, section 6."""

from __future__ import annotations

import pytest

from model_defs.checkpoint.random_tokenizer import write_tokenizer
from model_defs.presets import preset
from mxcompile.chat import DEFAULT_SYSTEM, ChatError, next_turn, opening, render
from mxcompile.tokenizer import Tokenizer


def text(*items):
    return [{"type": "text", "text": item} for item in items]


def test_system_and_user():
    rendered = render([{"role": "system", "content": text(DEFAULT_SYSTEM)}, {"role": "user", "content": "Hello!"}])
    assert rendered == (
        "<beginning_of_sentence>system ai_setting=assistant\n"
        "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nHello!<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )


def test_all_roles_and_tools_in_their_order():
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": '<function_call>```typescript\nfunctions.weather({"city": "Bonn"})\n```'},
        {"role": "function", "name": "weather", "content": text('{"sky": "grey"}')},
        {"role": "assistant", "content": text("It ", "rains.")},
    ]
    tools = [{"name": "weather", "description": "Größe"}, {"name": "second"}]
    assert render(messages, tools, add_generation_prompt=False) == (
        "<beginning_of_sentence>user name=user\nWeather?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
        '<function_call>```typescript\nfunctions.weather({"city": "Bonn"})\n```<end_of_sentence>\n'
        "<beginning_of_sentence>system function_response=functions\n"
        '{"name": "weather", "response": {"sky": "grey"}}<end_of_sentence>\n'
        "<beginning_of_sentence>ai name=assistant\nIt rains.<end_of_sentence>\n"
        '<beginning_of_sentence>system function_setting=functions\n{"name": "weather", "description": "Größe"}'
        "<end_of_sentence>\n"
        '<beginning_of_sentence>system function_setting=functions\n{"name": "second"}<end_of_sentence>\n'
    )


@pytest.mark.parametrize("role", ["system", "user", "function"])
def test_only_the_first_item_counts_save_for_the_assistant(role):
    rendered = render([{"role": role, "name": "f", "content": text("first", "second")}])
    assert "first" in rendered
    assert "second" not in rendered


@pytest.mark.parametrize("ended", [True, False])
def test_the_next_turn_continues_the_sequence_as_one_conversation(tmp_path, ended):
    """In tokens, which is what the state has seen: turn by turn equals the whole conversation at once."""
    write_tokenizer(preset("tiny"), tmp_path)
    tokenizer = Tokenizer.find(tmp_path)
    first = [{"role": "user", "content": "one"}]
    answer = [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    reply = tokenizer.encode("two") + ([510] if ended else [])
    turns = tokenizer.encode(render(first)) + reply + tokenizer.encode(next_turn("three", answer_ended=ended))
    assert turns == tokenizer.encode(render(first + answer))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, "message 0 has role 'tool'; known: system, user, assistant, function"),
        ({"content": "x"}, "message 0 has role None"),
        ({"role": "user"}, "message 0 needs content"),
        ({"role": "user", "content": []}, "message 0 needs content"),
        ({"role": "user", "content": [{"type": "image"}]}, "message 0 has a content item that is not text"),
        ({"role": "function", "content": "x"}, "message 0 answers a function call and needs the function's name"),
    ],
)
def test_what_the_template_cannot_say_is_refused(message, error):
    with pytest.raises(ChatError, match=error):
        render([message])


@pytest.mark.parametrize("tool", ["text", {"x": object()}])
def test_bad_tools_are_refused(tool):
    with pytest.raises(ChatError, match="tool 0"):
        render([{"role": "user", "content": "x"}], [tool])


def test_the_text_of_m1():
    """Another order and other headers than Text-01's: all that the system says, the tools, then the conversation."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "system", "content": "One."},
        {"role": "assistant", "content": text("I ", "ask.")},
        {"role": "function", "name": "weather", "content": "grey"},
        {"role": "function", "name": "time", "content": "late"},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": "And?"},
    ]
    rendered = render(messages, [{"name": "weather"}, {"name": "time"}], family="m1")
    assert rendered.startswith(
        "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nOne.Two.<end_of_sentence>\n"
        "<beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
        '{"name": "weather"}\n{"name": "time"}\n</tools>\n\nIf you need'
    )
    assert rendered.endswith(
        "\n</tool_calls><end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nWeather?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\nI ask.<end_of_sentence>\n"
        "<beginning_of_sentence>tool name=tools\ntool name: weather\ntool result: grey\n\n"
        "tool name: time\ntool result: late\n\n<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nAnd?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )
    assert opening(None, "Hi", family="m1")[0]["content"].endswith("based on MiniMax-M1 model.")
    with pytest.raises(ChatError, match="message 0 has role 'robot'"):
        render([{"role": "robot", "content": "beep"}], family="m1")
