"""Answers under guides through the real server: its own inputs, and the `openai` client."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jsonschema
import pydantic
import pytest

from mxcompile.chat import render
from mxcompile.guides import Guide

openai = pytest.importorskip("openai")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'start: WORD ("," WORD)?\nWORD: /[a-c]{2,3}/'
GUIDES = {
    "json_schema": (json.dumps(SCHEMA), lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
    "regex": ("[a-c]{3}-[0-9]{2}", lambda text: re.fullmatch("[a-c]{3}-[0-9]{2}", text)),
    "choice": ('["yes", "no", "né"]', lambda text: text in ("yes", "no", "né")),
    "grammar": (GRAMMAR, lambda text: re.fullmatch("[a-c]{2,3}(,[a-c]{2,3})?", text)),
}
ASKED = [{"role": "user", "content": "A record, please."}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.openai}/v1", api_key="none", max_retries=0) as made:
        yield made


def body(kind, text="", **settings):
    named = {"guided_decoding_guide_type": kind} | ({"guided_decoding_guide": text} if text else {})
    return {"text_input": "A record: ", "max_tokens": 150, "temperature": 1.0} | named | settings


def validated(text, finish_reason="stop"):
    assert finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", GUIDES)
def test_answers_of_each_kind(server, kind, stream):
    text, check = GUIDES[kind]
    for seed in range(3):
        found = server.generate(body(kind, text, seed=seed), stream=stream)
        assert found["finish_reason"] == "stop"
        assert check(found["text_output"]) is not False
        assert kind not in ("regex", "grammar") or check(found["text_output"])


def test_an_answer_is_what_the_engine_alone_gives(server, loaded):
    expected = loaded.generate("A record: ", max_new_tokens=150, guide=Guide("json_schema", json.dumps(SCHEMA)))
    found = server.generate(body("json_schema", json.dumps(SCHEMA), temperature=0.0), stream=True)
    assert (found["text_output"], found["output_ids"]) == (expected.text, expected.tokens)
    assert (found["finish_reason"], found["num_output_tokens"]) == (expected.finish_reason, len(expected.tokens))


def test_rows_with_and_without_a_guide_side_by_side(server, loaded):
    prompts = ["The layers remember", "Once", "x y z", "and so"]
    expected = [loaded.generate(prompt, max_new_tokens=40, stop_token_ids=()).tokens for prompt in prompts]
    free = [{"text_input": prompt, "max_tokens": 40, "end_id": -1} for prompt in prompts]
    bound = [body("json_schema", json.dumps(SCHEMA), seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        both = [each for pair in zip(free, bound, strict=True) for each in pair]
        found = list(pool.map(lambda one: server.generate(one, stream=True), both))
    assert [one["output_ids"] for one in found[::2]] == expected
    for one in found[1::2]:
        validated(one["text_output"], one["finish_reason"])


def test_an_answer_cut_short_says_so(server):
    found = server.generate(body("json_schema", json.dumps(SCHEMA), max_tokens=3), stream=False)
    assert (found["finish_reason"], len(found["output_ids"])) == ("length", 3)
    cut = server.generate(body("regex", "x{3}ab{9}", stop_words=["ab"]), stream=False)
    assert (cut["finish_reason"], cut["text_output"]) == ("stop", "xxx")


def test_without_an_end_token_it_ends_where_nothing_can_follow(server):
    text, check = GUIDES["choice"]
    found = server.generate(body("choice", text, end_id=-1), stream=True)
    assert found["finish_reason"] == "stop"
    assert check(found["text_output"])


def test_a_session_has_a_guide_for_each_answer(server):
    first = server.generate(body("regex", "a{3}", session_id="guided", session_start=True), stream=False)
    second = server.generate(body("regex", "b{2}", session_id="guided"), stream=False)
    third = server.generate({"text_input": " so", "session_id": "guided", "max_tokens": 2, "end_id": -1}, stream=False)
    assert (first["text_output"], second["text_output"]) == ("aaa", "bb")
    assert third["num_cached_tokens"] > second["num_cached_tokens"] > 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (body("xml", "a"), "'xml' is no kind of guide; known: json, json_schema, regex, choice, grammar"),
        (body("regex", "a{"), "regex: "),
        (
            body("json_schema", '{"type": "array", "uniqueItems": true}'),
            'json_schema: Unimplemented keys: ["uniqueItems"]',
        ),
        ({"text_input": "a", "guided_decoding_guide": "a"}, "guided_decoding_guide needs guided_decoding_guide_type"),
        (
            {"text_input": "a", "logit_bias_ids": [1, 2], "logit_bias_values": [1.0]},
            "there are 2 logit_bias_ids, but 1",
        ),
        ({"text_input": "a", "logit_bias_ids": [900], "logit_bias_values": [1.0]}, "logit_bias has token 900"),
        ({"text_input": "a", "logit_bias_ids": [9], "logit_bias_values": [101.0]}, "a value of logit_bias must be"),
    ],
)
def test_refusals(server, asked, message):
    status, answer = server.post("generate", asked)
    assert status == 400
    assert message in answer["error"]


def test_biases_over_triton(server):
    biases = {"logit_bias_ids": [70, 71], "logit_bias_values": [100.0, 99.0], "presence_penalty": 2.0}
    found = server.generate({"text_input": "a", "max_tokens": 4, "end_id": -1} | biases, stream=False)
    assert found["output_ids"] == [70, 71, 70, 71] or set(found["output_ids"]) == {70, 71}
    one = server.generate(
        {"text_input": "a", "max_tokens": 2, "logit_bias_ids": 70, "logit_bias_values": 100}, stream=False
    )
    assert one["output_ids"] == [70, 70]


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_format_for_several_answers_with_log_probabilities(client, loaded, stream):
    asked = dict(model="mxcompile", messages=ASKED, response_format=FORMAT, n=3, seed=5, logprobs=True, top_logprobs=1)
    asked |= {"max_tokens": 150}
    texts, logprobs, ends = ["", "", ""], [[], [], []], [None] * 3
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
                ends[choice.index] = choice.finish_reason or ends[choice.index]
    else:
        for choice in client.chat.completions.create(**asked).choices:
            texts[choice.index], ends[choice.index] = choice.message.content, choice.finish_reason
            logprobs[choice.index] = choice.logprobs.content
    for text, end in zip(texts, ends, strict=True):
        validated(text, end)
    assert len(set(texts)) > 1
    # Of the engine's own logits: tokens that the schema rules out are among the likeliest.
    free = loaded.generate(render(ASKED), max_new_tokens=1, logprobs=1)
    for entries in logprobs:
        assert entries[0].top_logprobs[0].logprob == pytest.approx(free.logprobs[0].top[0][1], abs=1e-3)
        assert entries[0].token == "{"


class Size(pydantic.BaseModel):
    kind: Literal["small", "large"]
    count: Literal[1, 2, 3]
    new: bool


def test_the_client_parses_what_it_asked_for(client):
    answer = client.chat.completions.parse(model="mxcompile", messages=ASKED, response_format=Size, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Size)


def test_any_json_object(client):
    ends = set()
    for seed in range(4):
        asked = dict(messages=ASKED, response_format={"type": "json_object"}, max_tokens=200, seed=seed)
        choice = client.chat.completions.create(model="mxcompile", logit_bias={"92": 9}, **asked).choices[0]
        ends.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    assert "stop" in ends


@pytest.mark.parametrize("kind", GUIDES)
def test_structured_outputs_of_both_endpoints(client, kind):
    text, check = GUIDES[kind]
    name = {"json_schema": "json"}.get(kind, kind)
    extra = {"structured_outputs": {name: json.loads(text) if kind in ("json_schema", "choice") else text}}
    asked = dict(model="mxcompile", max_tokens=150, seed=1, extra_body=extra)
    chat = client.chat.completions.create(messages=ASKED, **asked).choices[0]
    plain = client.completions.create(prompt="A record: ", **asked).choices[0]
    for found, end in ((chat.message.content, chat.finish_reason), (plain.text, plain.finish_reason)):
        assert end == "stop"
        assert check(found) is None if kind == "json_schema" else check(found)


UNIQUE = {"type": "array", "uniqueItems": True}


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        (dict(response_format={"type": "xml"}), "response_format.type", "response_format.type: "),
        (dict(response_format={"type": "json_schema"}), "response_format", "json_schema goes with type"),
        (
            dict(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": UNIQUE}}),
            "response_format",
            'response_format: Unimplemented keys: ["uniqueItems"]',
        ),
        (dict(extra_body={"structured_outputs": {"regex": "a{"}}), "structured_outputs", "unclosed counted repetition"),
        (dict(extra_body={"structured_outputs": {}}), "structured_outputs", "give one of json, json_object, regex"),
        (dict(extra_body={"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs", "give one of"),
        (
            dict(response_format=FORMAT, extra_body={"structured_outputs": {"regex": "a"}}),
            "structured_outputs",
            "give this or response_format, not both",
        ),
        (
            dict(
                tools=[{"type": "function", "function": {"name": "f"}}],
                extra_body={"structured_outputs": {"regex": "a"}},
            ),
            "structured_outputs",
            "regex does not go with tools; set tool_choice to none",
        ),
        (
            dict(
                tools=[
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"properties": {"a": UNIQUE}}},
                    }
                ]
            ),
            "tools",
            'tools: .*"uniqueItems"',
        ),
    ],
)
def test_what_the_client_is_told(client, asked, param, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="mxcompile", messages=ASKED, **asked)
    assert refused.value.body["param"] == param
    assert re.search(message if ".*" in message else re.escape(message), refused.value.body["message"])


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Bern", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_calls_have_arguments_of_the_schema(client, loaded, choice):
    text = loaded.tokenizer.token_bytes
    blanks = {str(token): -100 for token in range(508) if not text(token).strip()}  # else they fill the short engine
    asked = dict(model="mxcompile", messages=ASKED, tools=[WEATHER], tool_choice=choice, logit_bias=blanks)
    for seed in range(3):
        answer = client.chat.completions.create(**asked, seed=seed, parallel_tool_calls=False).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
        chunks = client.chat.completions.create(**asked, seed=seed, parallel_tool_calls=False, stream=True)
        streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [one.function.name for one in streamed] == ["get_weather"]
        jsonschema.validate(json.loads(streamed[0].function.arguments), WEATHER["function"]["parameters"])


def test_a_client_that_leaves_a_guided_stream_frees_its_slot(client, server):
    extra = {"structured_outputs": {"regex": "a{1,100000}"}}
    stream = client.chat.completions.create(
        model="mxcompile", messages=ASKED, max_tokens=200, stream=True, extra_body=extra, temperature=0
    )
    next(iter(stream))
    stream.close()
    server.wait_idle()
