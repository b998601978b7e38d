"""The `openai` client against the real server."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from served import LIMIT_S, until

from mxcompile.chat import render
from mxcompile.guides import Guide
from mxcompile.serving.openai.tool_grammar import tool_grammar
from mxcompile.serving.openai.tools import ToolCalls, tool_use

openai = pytest.importorskip("openai")
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do you remember?"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.openai}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["mxcompile"]
    assert client.models.retrieve("mxcompile").object == "model"


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "seed": 3, "extra_body": {"top_k": 6}}])
def test_chat_equals_a_single_run(client, loaded, settings):
    own = {key: value for key, value in settings.items() if key != "extra_body"} | settings.get("extra_body", {})
    expected = loaded.generate(render(ASKED), max_new_tokens=12, **own)
    asked = dict(model="mxcompile", messages=ASKED, max_completion_tokens=12, **settings)
    plain = client.chat.completions.create(**asked)
    assert plain.choices[0].message.content == expected.text
    assert plain.choices[0].finish_reason == expected.finish_reason
    assert plain.usage.prompt_tokens == expected.prompt_tokens
    assert plain.usage.completion_tokens == len(expected.tokens)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)


@pytest.mark.parametrize("prompt", ["The layers remember", [4, 5, 6]])
def test_completions_equal_a_single_run(client, loaded, prompt):
    expected = loaded.generate([prompt], max_new_tokens=16, stop_strings=("e",))[0]
    asked = dict(model="mxcompile", prompt=prompt, temperature=0, stop=["e"])
    assert client.completions.create(**asked).choices[0].text == expected.text
    pieces = client.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        (dict(model="other"), 404, "there is no model 'other'"),
        (dict(prompt=[1] * 400), 400, "400 tokens, but the engine holds at most 320"),
        (dict(prompt=[1] * 400, stream=True), 400, "400 tokens, but the engine holds at most 320"),
        (dict(prompt=["a", [1] * 400]), 400, "prompt"),
        (dict(prompt=["a", "b" * 400]), 400, "400 tokens, but the engine holds at most 320"),
        (dict(prompt=[]), 400, "prompt: give 1 to 128"),
        (dict(prompt=["a", "b"], extra_body={"session_id": "s"}), 400, "session_id: a session takes one prompt"),
        (dict(logprobs=21), 400, "logprobs: "),
        (dict(n=129), 400, "n: "),
        (dict(n=2, extra_body={"session_id": "s", "session_start": True}), 400, "a session goes on with one answer"),
        (dict(best_of=2), 400, "best_of: only 1"),
        (dict(suffix="end"), 400, "suffix: this model cannot fill in"),
        (dict(logit_bias={"512": 1}), 400, "logit_bias has token 512, but the vocabulary is 0 to 511"),
        (dict(logit_bias={"5": 101}), 400, "logit_bias.5: "),
        (dict(presence_penalty=3), 400, "presence_penalty: "),
        (dict(temperature=-1), 400, "temperature: "),
        (dict(prompt="x" * (17 << 20)), 413, "bytes"),
    ],
)
def test_errors_say_why(client, asked, status, message):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**(dict(model="mxcompile", prompt="a") | asked))
    assert refused.value.status_code == status
    assert message in refused.value.body["message"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(top_logprobs=2), "top_logprobs: needs logprobs"),
        (dict(tool_choice="auto"), "tool_choice: give tools"),
        (dict(tools=[{"type": "web_search"}]), "tools.0: must be"),
        (dict(tools=[{"type": "function", "function": {"name": "no spaces"}}]), "tools.0: a name must"),
        (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "other"}}), "no tool 'other'"),
        (dict(reasoning_effort="low"), "reasoning_effort: this model has no setting"),
        (dict(store=True), "store: nothing is stored"),
        (dict(messages=[{"role": "tool", "tool_call_id": "x", "content": "1"}]), "no message before it makes"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "reads text only"),
    ],
)
def test_what_chat_refuses(client, asked, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**(dict(model="mxcompile", messages=ASKED) | asked))
    assert message in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(client):
    nothing = dict(logit_bias={}, response_format={"type": "text"}, store=False, service_tier="auto", metadata={})
    answer = client.chat.completions.create(model="mxcompile", messages=ASKED, max_tokens=1, n=1, **nothing)
    assert answer.usage.completion_tokens == 1


def log_softmax_of_the_engine(loaded, prompt, tokens):
    """Natural log-probabilities [len(tokens), N], by their definition, in one run over everything."""
    ids_1T = np.array([[*prompt, *tokens]])
    logits_1TN = loaded.forward(ids_1T, [ids_1T.shape[1]], loaded.new_state(1), positions="all").logits
    logits_TN = logits_1TN[0, len(prompt) - 1 : -1].astype(np.float64)
    return logits_TN - np.log(np.exp(logits_TN).sum(axis=1, keepdims=True))


def check_logprobs(loaded, prompt, tokens, entries, top):
    """Entries of a chat answer against the engine's logits, up to the rounding of runs of different shapes."""
    expected_TN = log_softmax_of_the_engine(loaded, prompt, tokens)
    assert len(entries) == len(tokens)
    for token, entry, row_N in zip(tokens, entries, expected_TN, strict=True):
        assert entry.logprob == pytest.approx(row_N[token], abs=1e-3)
        assert bytes(entry.bytes) == loaded.tokenizer.token_bytes(token)
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        found = [one.logprob for one in entry.top_logprobs]
        assert found == pytest.approx(sorted(row_N, reverse=True)[:top], abs=1e-3)


@pytest.mark.parametrize("top", [0, 4])
def test_chat_logprobs_are_those_of_the_engine(client, loaded, top):
    text = render(ASKED)
    expected = loaded.generate(text, max_new_tokens=8, temperature=0.9, top_k=6, seed=5)
    asked = dict(model="mxcompile", messages=ASKED, max_tokens=8, temperature=0.9, seed=5, extra_body={"top_k": 6})
    plain = client.chat.completions.create(**asked, logprobs=True, top_logprobs=top).choices[0]
    assert plain.message.content == expected.text
    prompt = loaded.tokens(text)
    check_logprobs(loaded, prompt, expected.tokens, plain.logprobs.content, top)
    chunks = client.chat.completions.create(**asked, logprobs=True, top_logprobs=top, stream=True)
    choices = [chunk.choices[0] for chunk in chunks]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    check_logprobs(loaded, prompt, expected.tokens, entries, top)


def test_completion_logprobs_are_those_of_the_engine(client, loaded):
    prompt = [4, 5, 6]
    tokens = loaded.generate([prompt], max_new_tokens=6)[0].tokens
    rows_TN = log_softmax_of_the_engine(loaded, prompt, tokens)
    asked = dict(model="mxcompile", prompt=prompt, temperature=0, max_tokens=6, logprobs=2)
    plain = client.completions.create(**asked).choices[0].logprobs
    pieces = [piece.choices[0].logprobs for piece in client.completions.create(**asked, stream=True)]
    joined = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    for piece in filter(None, pieces):
        for name, values in joined.items():
            values += getattr(piece, name)
    for name, values in joined.items():
        if name in ("tokens", "text_offset"):
            assert values == getattr(plain, name)
    for found in (plain.token_logprobs, joined["token_logprobs"]):
        assert found == pytest.approx([row_N[token] for row_N, token in zip(rows_TN, tokens, strict=True)], abs=1e-3)
    assert plain.text_offset == [len("".join(plain.tokens[:index])) for index in range(6)]
    for top, row_N in zip(plain.top_logprobs, rows_TN, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(sorted(row_N, reverse=True)[:2], abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_runs_with_the_next_seeds(client, loaded, stream):
    """More answers than the engine has slots."""
    settings = dict(temperature=0.9, top_k=6)
    asked = dict(model="mxcompile", messages=ASKED, max_tokens=5, n=11, seed=40, temperature=0.9)
    made = client.chat.completions.create(
        **asked,
        stream=stream,
        extra_body={"top_k": 6},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    texts = [""] * 11
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content
        usage = chunk.usage
    expected = [loaded.generate(render(ASKED), max_new_tokens=5, seed=40 + index, **settings) for index in range(11)]
    assert texts == [one.text for one in expected]
    assert usage.prompt_tokens == expected[0].prompt_tokens, "the prompt counts once"
    assert usage.completion_tokens == sum(len(one.tokens) for one in expected)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_answers(client, loaded, stream):
    prompts = ["The layers", "remember", "what softmax"]
    made = client.completions.create(
        model="mxcompile",
        prompt=prompts,
        n=2,
        max_tokens=6,
        temperature=0.8,
        seed=9,
        stream=stream,
        extra_body={"top_k": 5},
    )
    texts = [""] * 6
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    settings = dict(max_new_tokens=6, temperature=0.8, top_k=5)
    assert texts == [loaded.generate(p, seed=seed, **settings).text for p in prompts for seed in (9, 10)]


@pytest.mark.parametrize("prompt", ["The layers remember", [4, 5, 6]])
def test_echo_and_penalties(client, loaded, prompt):
    penalties = dict(presence_penalty=0.7, frequency_penalty=1.1)
    expected = loaded.generate([prompt], max_new_tokens=20, **penalties)[0]
    assert expected.text != loaded.generate([prompt], max_new_tokens=20)[0].text, "the penalties must show"
    text = prompt if isinstance(prompt, str) else loaded.tokenizer.decode(prompt)
    asked = dict(model="mxcompile", prompt=prompt, temperature=0, max_tokens=20, echo=True, **penalties)
    assert client.completions.create(**asked).choices[0].text == text + expected.text
    pieces = client.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text + expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_prompts_have_logprobs_too(client, loaded, stream):
    """As evaluation harnesses ask for them: a prompt of several chunks, and one token more."""
    prompt = loaded.tokens("The layers remember what softmax would have to look up again and again. " * 2)
    assert len(prompt) > 64
    rows_TN = log_softmax_of_the_engine(loaded, prompt[:1], prompt[1:])
    asked = dict(model="mxcompile", prompt=prompt, echo=True, logprobs=3, max_tokens=1, temperature=0, stream=stream)
    joined = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    text, made = "", client.completions.create(**asked)
    for piece in made if stream else [made]:
        text += piece.choices[0].text
        if piece.choices[0].logprobs:
            for name, values in joined.items():
                values += getattr(piece.choices[0].logprobs, name)
    answer = loaded.generate([prompt], max_new_tokens=1)[0]
    assert text == loaded.tokenizer.decode(prompt) + answer.text == "".join(joined["tokens"])
    assert (joined["token_logprobs"][0], joined["top_logprobs"][0]) == (None, None)
    found = joined["token_logprobs"][1 : len(prompt)]
    assert found == pytest.approx([row_N[token] for row_N, token in zip(rows_TN, prompt[1:], strict=True)], abs=1e-3)
    for top, row_N, token in zip(joined["top_logprobs"][1 : len(prompt)], rows_TN, prompt[1:], strict=True):
        expected = [*sorted(row_N, reverse=True)[:3], row_N[token]]
        assert max(top.values()) == pytest.approx(expected[0], abs=1e-3)
        # Fewer where several tokens have the same text: parts of characters.
        assert all(min(abs(value - other) for other in expected) < 1e-3 for value in top.values())
    assert len(joined["tokens"]) == len(prompt) + len(answer.tokens)


def test_a_forced_call_names_its_function(client, loaded):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    said = ASKED[1:]
    asked = dict(model="mxcompile", messages=said, tools=TOOLS, tool_choice=choice, max_tokens=6, temperature=0)
    opening = "<function_call>```typescript\nfunctions.get_weather("
    guide = Guide("grammar", tool_grammar(tool_use(TOOLS, choice, None), "text-01"))
    expected = loaded.generate(render(said, [TOOLS[0]["function"]]) + opening, max_new_tokens=6, guide=guide)
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    reader = ToolCalls(tool_use(TOOLS, choice, None))
    wanted = [*reader.feed(expected.text)[1], *reader.finish()[1]][0]["function"]["arguments"]
    assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", wanted)
    assert answer.choices[0].message.content is None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert (streamed.index, streamed.function.name, streamed.function.arguments) == (0, "get_weather", wanted)
    said = [*said, answer.choices[0].message.model_dump(exclude_none=True)]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = client.chat.completions.create(model="mxcompile", messages=[*said, result], tools=TOOLS, max_tokens=2)
    assert again.usage.completion_tokens > 0


def test_requests_have_names(client, server):
    headers = {"X-Request-Id": "my-request-7", "X-Client-Id": "the proxy says"}
    asked = dict(model="mxcompile", prompt="a", max_tokens=2, user="the body says")
    answer = client.completions.with_raw_response.create(**asked, extra_headers=headers)
    assert answer.headers["x-request-id"] == "my-request-7"
    server.wait_logged('"request_id": "my-request-7", "client": "the proxy says"')  # the engine's line
    server.wait_logged('"request_id": "my-request-7", "path": "/v1/completions", "status": 200')  # the front's line
    client.completions.create(**asked, extra_headers={"X-Request-Id": "next"})
    client.completions.create(model="mxcompile", prompt="a", max_tokens=2, extra_headers={"X-Request-Id": "last"})
    server.wait_logged('"request_id": "next", "client": "the body says"')
    key = hashlib.sha256(b"none").hexdigest()[:16]
    server.wait_logged(f'"request_id": "last", "client": "key:{key}"')
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**asked, extra_headers={"X-Request-Id": "not\tusable"}, extra_body={"n": 0})
    assert len(refused.value.response.headers["x-request-id"]) == 32


def test_an_answer_may_go_on_behind_its_end(client, loaded):
    prompts = ([first, second] for first in range(3, 300) for second in (7, 70))
    prompt = next(p for p in prompts if loaded.generate([p], max_new_tokens=8)[0].finish_reason == "stop")
    expected = loaded.generate([prompt], max_new_tokens=8, stop_token_ids=())[0]
    asked = dict(model="mxcompile", prompt=prompt, temperature=0, max_tokens=8)
    found = client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert found.usage.completion_tokens == 8
    assert found.choices[0].text == expected.text


def test_a_role_that_the_template_lacks(client):
    with pytest.raises(openai.BadRequestError, match="role 'robot'"):
        client.chat.completions.create(model="mxcompile", messages=[{"role": "robot", "content": "beep"}])


def test_leaving_a_stream_frees_its_slot(client, server):
    for _ in range(10):  # more than there are slots
        asked = dict(model="mxcompile", prompt=[1], max_tokens=300, stream=True)
        with client.completions.create(**asked) as stream:
            next(iter(stream))
    server.wait_idle()


def test_health_and_metrics(server):
    def read(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.openai}{path}", timeout=LIMIT_S) as response:
            return response.read().decode()

    assert read("/health/live") == "live\n"
    assert read("/health/ready") == "ready\n"
    until(lambda: "mxcompile_time_to_first_token_seconds_bucket" in read("/metrics"), "no numbers come")
    with pytest.raises(urllib.error.HTTPError):
        read("/docs")
    documented = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for line in read("/metrics").splitlines():
        if line.startswith("mxcompile_"):
            name = line.removeprefix("mxcompile_").split("{")[0]
            name = re.sub("_(bucket|sum|count)$", "", name)
            assert f"`{name}" in documented


def test_a_full_queue_and_a_stop_with_running_streams(start_server):
    """Too much is refused with a time to come back; SIGTERM lets a running stream end and refuses new requests."""
    server = start_server("--max-queue", 20, "--max-queue-per-client", 10, "--drain", LIMIT_S)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.openai}/v1", api_key="none", max_retries=0) as client:
        many = dict(model="mxcompile", prompt=[1], max_tokens=300, stream=True, extra_body={"ignore_eos": True})
        with client.completions.create(**many, n=128, user="many") as stream:
            next(iter(stream))
            for user, status in (("many", 429), ("other", 503)):
                with pytest.raises(openai.APIStatusError, match="are waiting already") as refused:
                    client.completions.create(model="mxcompile", prompt="a", user=user)
                assert refused.value.status_code == status
                assert refused.value.response.headers["retry-after"] == "1"
        server.wait_idle()

        def ask_until_refused():
            while True:
                client.completions.create(model="mxcompile", prompt="a", max_tokens=1)

        with client.completions.create(**many, n=16) as stream:
            pieces = iter(stream)
            first = next(pieces)
            server.process.terminate()
            with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
                ask_until_refused()
            rest = list(pieces)
        assert first.choices[0].finish_reason is None
        ends = [piece.choices[0].index for piece in rest if piece.choices[0].finish_reason == "length"]
        assert sorted(ends) == list(range(16)), "every answer came to its end"
    until(
        lambda: server.process.poll() is not None or server.process.terminate(),
        "asked again and again, it does not end",
    )
    assert server.stop() == 0, server.log.read_text()
