"""The `openai` client against the real server."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from mxcompile.chat import render

openai = pytest.importorskip("openai")
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do you remember?"}]


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
        (dict(prompt=["a", "b"]), 400, "one prompt per request"),
        (dict(logprobs=3), 400, "logprobs: not supported here"),
        (dict(n=2), 400, "n: "),
        (dict(temperature=-1), 400, "temperature: "),
        (dict(prompt="x" * (17 << 20)), 413, "bytes"),
    ],
)
def test_errors_say_why(client, asked, status, message):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**(dict(model="mxcompile", prompt="a") | asked))
    assert refused.value.status_code == status
    assert message in refused.value.body["message"]


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
        with urllib.request.urlopen(f"http://127.0.0.1:{server.openai}{path}", timeout=30) as response:
            return response.read().decode()

    assert read("/health/live") == "live\n"
    assert read("/health/ready") == "ready\n"
    assert "mxcompile_time_to_first_token_seconds_bucket" in read("/metrics")
    with pytest.raises(urllib.error.HTTPError):
        read("/docs")
