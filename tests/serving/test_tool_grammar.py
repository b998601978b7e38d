"""Calls under a grammar: whatever a model prefers, what is read out of its answer follows the functions' schemas."""

from __future__ import annotations

import json

import jsonschema
import pytest
import random_model

from mxcompile.errors import MxcompileError
from mxcompile.guides import Guide, GuideError
from mxcompile.guides.compiler import GuideCompiler
from mxcompile.serving.openai.bodies import ChatBody
from mxcompile.serving.openai.tool_grammar import tool_grammar
from mxcompile.serving.openai.tools import ToolCalls, tool_use

EOS, SIZE = 510, 512
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 5}, "days": {"$ref": "#/$defs/few"}},
        "required": ["place"],
        "additionalProperties": False,
        "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 7}},
    },
}
SUM = {
    "name": "sum-of",
    "parameters": {"properties": {"x": {"enum": [1, "one"]}}, "required": ["x"], "additionalProperties": False},
}
NOW = {"name": "now"}
SCHEMAS = {
    each["name"]: {"type": "object"} | each.get("parameters", {"maxProperties": 0}) for each in (WEATHER, SUM, NOW)
}
FAMILIES = ["text-01", "m1"]
OPENING = {"text-01": "<function_call>", "m1": "<tool_calls>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return random_model.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    made = GuideCompiler(tokenizer, SIZE)
    yield made
    made.close()


def tools(*functions, strict=True):
    return [{"type": "function", "function": each | {"strict": strict}} for each in functions]


def answers(compiler, tokenizer, use, family, *, begin="", content=None, seeds=12, haste=0.0):
    """Text and calls of answers that ended, as a client gets them."""
    guide = Guide("grammar", tool_grammar(use, family, content))
    found = []
    for seed in range(seeds):
        result = random_model.written(
            compiler,
            tokenizer,
            guide,
            seed,
            size=SIZE,
            temperature=1.0,
            most=300,
            stop_token_ids=(EOS,),
            begin=tokenizer.encode(begin),
            haste=haste,
        )
        if result.finish_reason == "stop":
            reader = ToolCalls(use)
            parts = [*map(reader.feed, result.text), reader.finish()]
            calls = [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in reader.calls]
            found.append(("".join(text for text, _ in parts), calls))
    assert len(found) >= seeds // 2
    for _, calls in found:
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strict", [True, False])
def test_a_named_function_is_called_once(compiler, tokenizer, family, strict):
    choice = {"type": "function", "function": {"name": "sum-of"}}
    use = tool_use(tools(WEATHER, SUM, strict=strict), choice, None, family)
    for text, calls in answers(compiler, tokenizer, use, family):
        assert (text, [name for name, _ in calls]) == ("", ["sum-of"])


@pytest.mark.parametrize("family", FAMILIES)
def test_required_calls_are_of_any_function_and_of_any_number(compiler, tokenizer, family):
    use = tool_use(tools(WEATHER, SUM, NOW), "required", None, family)
    found = answers(compiler, tokenizer, use, family, seeds=30)
    assert all(calls and not text for text, calls in found)
    assert {name for _, calls in found for name, _ in calls} == set(SCHEMAS)
    assert max(len(calls) for _, calls in found) > 1
    alone = tool_use(tools(WEATHER, SUM, NOW), "required", False, family)
    assert all(len(calls) == 1 for _, calls in answers(compiler, tokenizer, alone, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_may_speak_and_then_call_a_strict_function(compiler, tokenizer, family):
    use = tool_use(tools(WEATHER, SUM), None, None, family)
    for text, calls in answers(compiler, tokenizer, use, family, begin=f"<b> look:\n{OPENING[family]}", haste=9.0):
        assert text.startswith("<b> look:\n")
        assert calls
        assert not any(mark in text for mark in OPENING.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_may_also_just_speak(compiler, tokenizer, family):
    use = tool_use(tools(NOW), "auto", None, family)
    follower = compiler.compile(Guide("grammar", tool_grammar(use, family)))()
    assert follower.allowed()[1]  # say nothing at all
    for token in tokenizer.encode("No <tool, no call."):
        assert follower.allowed()[0][token]
        follower.accept(token)
    assert follower.allowed()[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_calls_or_content_that_follows_its_schema(compiler, tokenizer, family):
    content = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    use = tool_use(tools(SUM, strict=False), "auto", False, family)
    for text, calls in answers(compiler, tokenizer, use, family, content=content, begin="{"):
        jsonschema.validate(json.loads(text), content)
        assert not calls
    for text, calls in answers(compiler, tokenizer, use, family, content=content, begin=OPENING[family]):
        assert (text, len(calls)) == ("", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_body_asks_for_the_grammar_of_its_family(family):
    said = {"model": "m", "messages": [{"role": "user", "content": "Now?"}]}
    (plain,) = ChatBody(**said).requests(family, False)
    assert not any(name.startswith("guided") for name in plain)
    (forced,) = ChatBody(**said, tools=tools(NOW), tool_choice="required").requests(family, False)
    use = tool_use(tools(NOW), "required", None, family)
    assert forced["text_input"].endswith(use.forced)
    assert forced["guided_decoding_guide_type"] == "grammar"
    assert forced["guided_decoding_guide"] == tool_grammar(use, family)
    named = ChatBody(**said, response_format={"type": "json_object"}).requests(family, False)[0]
    assert named["guided_decoding_guide_type"] == "json"
    assert "guided_decoding_guide" not in named


def test_where_nothing_is_asked_answers_are_free():
    assert tool_grammar(tool_use(None, None, None), "text-01") is None
    assert tool_grammar(tool_use(tools(SUM, strict=False), "auto", None), "text-01") is None
    assert tool_grammar(tool_use(tools(SUM), "none", None), "text-01") is None


UNIQUE = {"name": "pick", "parameters": {"properties": {"of": {"type": "array", "uniqueItems": True}}}}


def test_what_the_library_cannot_check_is_refused_if_strict_and_left_to_the_model_if_not(compiler):
    for strict in (True, False):
        guide = Guide("grammar", tool_grammar(tool_use(tools(UNIQUE, strict=strict), "required", None), "text-01"))
        if strict:
            with pytest.raises(GuideError, match='Unimplemented keys: \\["uniqueItems"\\]'):
                compiler.compile(guide)
        else:
            compiler.compile(guide)


def test_parameters_that_are_no_schema():
    with pytest.raises(MxcompileError, match=r"tools\.0: parameters must be a JSON schema"):
        tool_grammar(tool_use(tools({"name": "f", "parameters": [1]}), "required", None), "text-01")
