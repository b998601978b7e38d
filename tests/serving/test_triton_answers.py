"""What Triton's clients can ask for beside one answer: several, with details, under a name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from served import LIMIT_S, listed

CLIENT = Path(__file__).with_name("grpc_client.py")


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_over_http(server, loaded, stream):
    body = {"input_ids": [4, 5, 6], "max_tokens": 5, "temperature": 0.7, "top_k": 6, "seed": 2**64 - 1, "n": 3}
    connection, response = server.open("generate_stream", body | {"stream": stream})
    events = [json.loads(line[5:]) for line in response.read().decode().splitlines() if line.startswith("data:")]
    connection.close()
    for index, seed in enumerate((2**64 - 1, 0, 1)):
        expected = loaded.generate([[4, 5, 6]], max_new_tokens=5, temperature=0.7, top_k=6, seed=seed)[0]
        own = [event for event in events if event["choice_index"] == index]
        assert "".join(event["text_output"] for event in own) == expected.text
        assert [token for event in own for token in listed(event.get("output_ids", []))] == expected.tokens
        assert [event["num_output_tokens"] for event in own if "finish_reason" in event] == [len(expected.tokens)]


def test_details_penalties_echo_and_names_over_grpc(server, installation, loaded):
    inputs = {"input_ids": [4, 5, 6], "max_tokens": 6, "stream": True, "top_log_probs": 2, "echo": True}
    inputs |= {"presence_penalty": 0.5, "frequency_penalty": 1.25}
    request = {"id": 1, "inputs": inputs, "options": {"request_id": "named-by-grpc", "sequence_id": 77}}
    done = subprocess.run(
        [installation.python, CLIENT, str(server.grpc)],
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    found = json.loads(done.stdout)
    assert found["error"] is None, found
    settings = dict(max_new_tokens=6, presence_penalty=0.5, frequency_penalty=1.25, logprobs=2)
    expected = loaded.generate([[4, 5, 6]], **settings)[0]
    text = "".join(response["text_output"][0] for response in found["responses"])
    assert text == loaded.tokenizer.decode([4, 5, 6]) + expected.text
    details = [json.loads(entry) for one in found["responses"] for entry in one.get("token_details", [])]
    assert [entry["id"] for entry in details] == expected.tokens
    for entry, logprobs in zip(details, expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(logprobs.chosen, abs=1e-3)
        assert [one["logprob"] for one in entry["top"]] == pytest.approx([v for _, v in logprobs.top], abs=1e-3)
    server.wait_logged('"request_id": "named-by-grpc", "client": "correlation id 77"')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 0}, "n must be between 1 and 128, not 0"),
        ({"n": 129}, "n must be between 1 and 128, not 129"),
        ({"top_log_probs": 21}, "top_log_probs must be between 0 and 20, not 21"),
        ({"presence_penalty": 101}, "presence_penalty must be a number of at least -100"),
        ({"n": 2, "session_id": "a", "session_start": True}, "a session goes on with one answer"),
    ],
)
def test_what_cannot_be_done_is_told(server, body, message):
    status, answer = server.post("generate", {"text_input": "a"} | body)
    assert status == 400
    assert message in answer["error"]
