"""Guides against what they promise: whatever a model prefers, its answer is what the guide describes."""

from __future__ import annotations

import json
import re
import sys
from itertools import product

import jsonschema
import numpy as np
import pytest
import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.errors import EnvironmentProblem, MxcompileError
from mxcompile.guides import Guide, GuideError
from mxcompile.guides.compiler import GuideCompiler
from mxcompile.guides.guide import MOST_BYTES
from mxcompile.tokenizer import Tokenizer

EOS, KNOWN, PADDED = 510, 512, 520


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return random_model.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    """For an engine whose vocabulary is padded."""
    made = GuideCompiler(tokenizer, PADDED)
    yield made
    made.close()


def written(compiler, tokenizer, guide, seed, most=400, stop_token_ids=(EOS,), **settings):
    """What a model of random logits writes under a guide."""
    return random_model.written(
        compiler, tokenizer, guide, seed, size=PADDED, most=most, stop_token_ids=stop_token_ids, **settings
    )


def schema(**keys):
    return Guide("json_schema", json.dumps(keys))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
plain = st.none() | st.booleans() | st.integers(-99, 99) | names


@st.composite
def bounded(draw, kind):
    low = draw(st.integers(-1000, 1000))
    return {"type": kind, "minimum": low, "maximum": low + draw(st.integers(0, 500))}


leaves = st.one_of(
    bounded("integer"),
    bounded("number"),
    st.builds(lambda each: {"type": "integer", "multipleOf": each, "minimum": 0, "maximum": 999}, st.integers(1, 50)),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 5)] * 2
    ),
    st.builds(
        lambda text: {"type": "string", "pattern": text}, st.sampled_from(["^[a-c]{1,4}$", "^é?x$", "^(yes|no)\\.$"])
    ),
    st.builds(lambda form: {"type": "string", "format": form}, st.sampled_from(["date", "ipv4", "uuid"])),
    st.builds(lambda values: {"enum": values}, st.lists(plain, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, plain),
    st.builds(lambda kinds: {"type": kinds}, st.lists(st.sampled_from(["null", "boolean"]), min_size=1, unique=True)),
)


@st.composite
def objects(draw, inner):
    keys = draw(st.lists(names, unique=True, max_size=3))
    values = {key: draw(inner) for key in keys}
    required = draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    return {"type": "object", "properties": values, "required": required, "additionalProperties": False}


@st.composite
def arrays(draw, inner):
    low = draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}


schemas = st.recursive(
    leaves,
    lambda inner: (
        objects(inner) | arrays(inner) | st.builds(lambda any: {"anyOf": any}, st.lists(inner, min_size=1, max_size=3))
    ),
    max_leaves=6,
)


@settings(max_examples=80)
@given(schemas, st.integers(0, 2**32), st.sampled_from([0.0, 1.0]))
def test_an_answer_under_a_schema_validates(compiler, tokenizer, asked, seed, temperature):
    result = written(compiler, tokenizer, Guide("json_schema", json.dumps(asked)), seed, temperature=temperature)
    if result.finish_reason == "stop":
        checker = jsonschema.Draft202012Validator(asked, format_checker=jsonschema.FormatChecker())
        checker.validate(json.loads(result.text))
    else:
        assert len(result.tokens) == 400


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_that_contains_itself(compiler, tokenizer):
    results = [written(compiler, tokenizer, schema(**PERSON), seed, temperature=1.0) for seed in range(12)]
    ended = [json.loads(result.text) for result in results if result.finish_reason == "stop"]
    assert len(ended) >= 6
    for value in ended:
        jsonschema.validate(value, PERSON)
    assert any(value.get("friends") for value in ended)


def test_any_object(compiler, tokenizer):
    results = [written(compiler, tokenizer, Guide("json"), seed, temperature=1.0, most=300) for seed in range(12)]
    ended = [json.loads(result.text) for result in results if result.finish_reason == "stop"]
    assert ended
    assert all(isinstance(value, dict) for value in ended)


LANGUAGE = {f"{a}{b}{c}" for a, b, c in product(("the", "then", "in", "né"), ("", " and", " 中"), ("", "ing", "\n"))}
EXPRESSION = r"(the|then|in|né)(| and| 中)(|ing|\n)"


@pytest.mark.parametrize(
    "guide",
    [
        Guide("regex", EXPRESSION),
        Guide("choice", json.dumps(sorted(LANGUAGE))),
        Guide("grammar", 'start: A B? (C | "\\n")?\nA: /the|then|in|né/\nB: " and" | " 中"\nC: "ing"'),
        Guide(
            "grammar",
            'root ::= first second? ("ing" | [\\n])?\nfirst ::= "the" "n"? | "in" | "né"\nsecond ::= " and" | " 中"',
        ),
    ],
    ids=["regex", "choice", "lark", "gbnf"],
)
def test_allowed_is_exactly_what_can_still_become_an_answer(compiler, tokenizer, guide):
    assert all(re.fullmatch(EXPRESSION, text) for text in LANGUAGE)
    answers = {text.encode() for text in LANGUAGE}
    prefixes = {answer[:end] for answer in answers for end in range(len(answer) + 1)}
    tokens = [tokenizer.token_bytes(token) for token in range(KNOWN)]
    make, seen = compiler.compile(guide), set()
    open_paths = [((), b"")]
    while open_paths:  # every text that can come about, by one way of cutting it into tokens
        path, past = open_paths.pop()
        if past in seen:
            continue
        seen.add(past)
        follower = make()
        for token in path:
            follower.accept(token)
        allowed_N, may_end = follower.allowed()
        assert allowed_N.shape == (PADDED,)
        next_tokens = {
            token
            for token, data in enumerate(tokens)
            if data and token not in tokenizer.special and past + data in prefixes
        }
        assert set(np.flatnonzero(allowed_N)) == next_tokens
        assert may_end == (past in answers)
        open_paths += [((*path, token), past + tokens[token]) for token in next_tokens]
    assert answers <= seen


@settings(max_examples=60)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=9),
        min_size=1,
        max_size=6,
    )
)
def test_any_texts_can_be_chosen_from(compiler, tokenizer, texts):
    make = compiler.compile(Guide("choice", json.dumps(texts)))
    for text in texts:
        follower = make()
        for token in tokenizer.encode(text):
            assert follower.allowed()[0][token]
            follower.accept(token)
        assert follower.allowed()[1]


def test_a_grammar_may_name_special_tokens_but_none_that_stand_for_nothing(compiler, tokenizer):
    call = tokenizer.token_id("<function_call>")
    assert list(np.flatnonzero(compiler.compile(Guide("grammar", 'start: <function_call> "x"'))().allowed()[0])) == [
        call
    ]
    allowed_N, _ = compiler.compile(Guide("grammar", "start: <[*]>"))().allowed()
    assert set(np.flatnonzero(allowed_N)) == set(range(KNOWN))
    texts_N, _ = compiler.compile(Guide("regex", "(?s:.*)"))().allowed()
    assert not texts_N[sorted(tokenizer.special)].any()


def test_blanks_do_not_go_on_for_ever(compiler, tokenizer):
    follower = compiler.compile(Guide("json"))()
    for text in ("{", "\n", *" " * 40):
        follower.accept(tokenizer.token_id({"\n": "Ċ", " ": "Ġ"}.get(text, text)))
    assert not follower.allowed()[0][tokenizer.token_id("Ġ")]


def test_without_a_stop_token_an_answer_ends_where_nothing_can_follow(compiler, tokenizer):
    result = written(compiler, tokenizer, Guide("choice", '["yes", "no"]'), 3, stop_token_ids=())
    assert result.text in ("yes", "no")
    assert (result.finish_reason, result.stop_reason) == ("stop", None)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "a{", "regex: .*unclosed counted repetition"),
        ("regex", "(?=x)y", "regex: .*look-around.* is not supported"),
        ("json_schema", '{"a"', "json_schema: is not JSON"),
        ("json_schema", "[1]", "json_schema: must be a JSON object"),
        ("json_schema", "[" * 100_000, "json_schema: is not JSON"),
        (
            "json_schema",
            '{"type": "array", "uniqueItems": true}',
            'json_schema: Unimplemented keys: \\["uniqueItems"\\]',
        ),
        ("json_schema", '{"type": "text"}', "json_schema: Invalid type: text"),
        ("json_schema", '{"$ref": "http://x/y"}', "json_schema: Resource 'http://x/y' is not present"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "json_schema: Unsatisfiable schema"),
        (
            "json_schema",
            '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
            "json_schema: no answer can begin",
        ),
        ("choice", "[]", "choice: must be a list of texts"),
        ("choice", '["a", ""]', "choice: must be a list of texts"),
        ("choice", '["\\ud800"]', "choice: must be a list of texts"),
        ("choice", '"a"', "choice: must be a list of texts"),
        ("grammar", "foo", "grammar: Expected ::="),
        ("grammar", 'start: "a" bar', 'grammar: .*unknown name: "bar"'),
        ("grammar", "start: start", "grammar: no answer can begin"),
        ("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "grammar: maximum recursion depth"),
    ],
)
def test_guides_that_cannot_be_followed(compiler, kind, text, message):
    with pytest.raises(GuideError, match=f"^{message}") as error:
        compiler.compile(Guide(kind, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "a", "'xml' is no kind of guide; known: json, json_schema"),
        ("json", "{}", "the guide json takes no text"),
        ("regex", "", "the guide regex needs a text"),
        ("regex", "é" * MOST_BYTES, f"the regex has {2 * MOST_BYTES} bytes; at most {MOST_BYTES} are taken"),
    ],
)
def test_what_is_no_guide(kind, text, message):
    with pytest.raises(GuideError, match=message):
        Guide(kind, text)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "json_schema",
            '{"type": "integer", "multipleOf": 9999991}',
            "takes longer than 2 s to compile; make it simpler",
        ),
        (
            "grammar",
            "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"\nstart: r0',
            "is too large or too deeply nested to compile; make it simpler",
        ),
    ],
    ids=["slow", "deep"],
)
def test_a_guide_that_would_hang_or_end_the_process_ends_another_one(compiler, kind, text, message):
    with pytest.raises(GuideError, match=message):
        compiler.compile(Guide(kind, text))
    assert compiler.compile(Guide("regex", "a"))().allowed()[0].any()


def test_definitions_may_lie_deep_inside_each_other(compiler):
    inside = {
        f"d{i}": {"properties": {"a": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "null"}]}}} for i in range(300)
    }
    make = compiler.compile(schema(**{"$ref": "#/$defs/d0", "$defs": inside | {"d300": {"type": "integer"}}}))
    assert make().allowed()[0].any()


def test_engines_without_a_fitting_tokenizer(tokenizer):
    with pytest.raises(MxcompileError, match="needs a tokenizer, which this engine was built without"):
        GuideCompiler(None, 23).compile(Guide("json"))
    letters = Tokenizer.__new__(Tokenizer)
    letters._bytes = None
    with pytest.raises(MxcompileError, match="needs a byte-level tokenizer"):
        GuideCompiler(letters, 23).compile(Guide("json"))


def test_without_the_library_the_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GuideCompiler(tokenizer, KNOWN)
    compiler.prepare()
    with pytest.raises(EnvironmentProblem, match=r"pip install 'mxcompile\[structured\]'"):
        compiler.compile(Guide("json"))
