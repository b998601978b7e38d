"""The real server against the engine run alone: same tokens, clear errors, nothing leaked."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from served import LIMIT_S, triton_venv, until
from soak_clients import GrpcClients, triton_http
from soak_watch import ready

CLIENT = Path(__file__).with_name("grpc_client.py")
WORDS = "the lightning layers remember what softmax would have to look up again and again".split()


def requests(count, seed):
    """Mixed lengths, text and ids, greedy and seeded.

    Drawn tokens come from few candidates: over a flat distribution of 512, as random weights give, a draw falls within
    rounding of a boundary about once in a thousand. The seeds in use were looked through: noise of 1e-4 on the logits, five times
    what batching does to them, changes no answer.
    """
    source = random.Random(seed)
    found = []
    for index in range(count):
        length = source.choice([1, 3, 10, 40, 120])
        body = {"max_tokens": source.choice([1, 4, 12, 30])}
        if index % 3:
            body["text_input"] = " ".join(source.choices(WORDS, k=max(1, length // 4)))
        else:
            body["input_ids"] = [source.randrange(500) for _ in range(length)]
        if index % 2:
            body |= {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "seed": source.randrange(2**63)}
        if index % 4 == 3:
            body["stop_words"] = ["e", "th"]
        found.append(body)
    return found


def alone(loaded, body, prompt=None):
    """What `mxcompile run` would give."""
    settings = {key: body[key] for key in ("temperature", "top_k", "top_p", "seed") if key in body}
    asked = prompt if prompt is not None else body.get("text_input", body.get("input_ids"))
    return loaded.generate(
        [asked], max_new_tokens=body["max_tokens"], stop_strings=tuple(body.get("stop_words", ())), **settings
    )[0]


def agrees(found, expected):
    assert found["output_ids"] == expected.tokens
    assert found["text_output"] == expected.text
    assert found["finish_reason"] == expected.finish_reason
    assert found["num_input_tokens"] == expected.prompt_tokens
    assert found["num_output_tokens"] == len(expected.tokens)


@pytest.mark.parametrize("clients", [1, 8, 32])
def test_http_equals_single_runs(server, loaded, clients):
    bodies = requests(clients, seed=clients)
    with ThreadPoolExecutor(clients) as pool:
        streamed = list(pool.map(lambda body: server.generate(body, stream=True), bodies))
        plain = list(pool.map(lambda body: server.generate(body, stream=False), bodies))
    for body, *found in zip(bodies, streamed, plain, strict=True):
        for one in found:
            agrees(one, alone(loaded, body))


def over_grpc(server, installation, asked):
    done = subprocess.run(
        [installation.python, CLIENT, str(server.grpc)],
        input="".join(json.dumps({"id": index, **one}) + "\n" for index, one in enumerate(asked)),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(map(json.loads, done.stdout.splitlines()), key=lambda one: one["id"])


@pytest.mark.parametrize("clients", [1, 8, 32])
def test_grpc_equals_single_runs(server, installation, loaded, clients):
    bodies = requests(clients, seed=200 + clients)
    asked = [{"inputs": body | {"stream": bool(index % 2)}} for index, body in enumerate(bodies)]
    for body, one in zip(bodies, over_grpc(server, installation, asked), strict=True):
        assert one["error"] is None
        last = {key: value[0] for key, value in one["responses"][-1].items() if key != "output_log_probs" and value}
        last["output_ids"] = [token for response in one["responses"] for token in response["output_ids"]]
        last["text_output"] = "".join(response["text_output"][0] for response in one["responses"])
        agrees(last, alone(loaded, body))


def test_equals_the_command_line(server, engine):
    body = {"text_input": "The layers", "max_tokens": 12, "temperature": 0.7, "top_k": 6, "seed": 11}
    options = "--max-new-tokens 12 --temperature 0.7 --top-k 6 --seed 11 --threads 1 --json".split()
    command = [sys.executable, "-m", "mxcompile", "run", engine, "--prompt", body["text_input"], *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert server.generate(body, stream=False)["output_ids"] == json.loads(done.stdout)["tokens"]


def test_log_probabilities(server, loaded):
    body = {"input_ids": [4, 5, 6], "max_tokens": 5}
    expected = loaded.generate([[4, 5, 6]], max_new_tokens=5, logprobs=0)[0]
    found = server.generate(body | {"return_log_probs": True}, stream=False)["output_log_probs"]
    assert found == pytest.approx([entry.chosen for entry in expected.logprobs], abs=1e-3)


def test_a_session_continues_where_it_was(server, loaded):
    said = []
    for turn, new in enumerate(([7] * 50, [8, 9], [10])):
        body = {"input_ids": new, "max_tokens": 6}
        found = server.generate(body | {"session_id": "one", "session_start": turn == 0}, stream=bool(turn % 2))
        said += new
        assert found["output_ids"] == alone(loaded, body, prompt=said).tokens
        assert found["num_cached_tokens"] == (len(said) - len(new) - 1 if turn else 0)
        said += found["output_ids"]


def test_a_shared_prefix_is_read_once(server, loaded):
    prefix = [random.Random(5).randrange(500) for _ in range(100)]
    for rest, cached in (([1, 2], 0), ([3], 96), ([1, 2], 96)):
        body = {"input_ids": prefix + rest, "max_tokens": 6}
        found = server.generate(body, stream=False)
        assert found["num_cached_tokens"] == cached
        agrees(found, alone(loaded, body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input_ids": [1] * 321}, "321 tokens, but the engine holds at most 320"),
        ({"text_input": "x" * 100_000}, "too long: it has 100000 characters, and the engine holds at most 320 tokens"),
        ({}, "either text_input or input_ids"),
        ({"text_input": "a", "input_ids": [1]}, "either text_input or input_ids"),
        ({"text_input": ""}, "empty"),
        ({"input_ids": [512]}, "vocabulary is 0 to 511"),
        ({"input_ids": [-1]}, "vocabulary is 0 to 511"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"text_input": "a", "temperature": -1}, "temperature"),
        ({"text_input": "a", "top_p": 2}, "top_p"),
        ({"text_input": "a", "stop_words": [""]}, "stop string"),
        ({"text_input": "a", "temprature": 1}, "unknown field 'temprature'"),
        ({"text_input": "a", "session_id": "never started"}, "is not known"),
    ],
)
def test_bad_requests_are_told_why(server, body, message):
    for path in ("generate", "generate_stream"):
        connection, response = server.open(path, body)
        text = response.read().decode()
        connection.close()
        assert response.status == 400
        assert message in json.loads(text.removeprefix("data:"))["error"]
        assert "Traceback" not in text


def test_malformed_requests_do_no_harm(server, loaded):
    for data in (b"", b"{", b"[]", b'{"text_input": ["a", "b"]}', b'{"text_input": {"a": 1}}', b'{"max_tokens": "x"}'):
        connection, response = server.open("generate", data)
        assert response.status >= 400
        assert "error" in json.loads(response.read())
        connection.close()
    body = {"text_input": "still there", "max_tokens": 5}
    agrees(server.generate(body, stream=False), alone(loaded, body))


def test_clients_that_leave_free_their_slots(server, installation, loaded):
    """More than there are slots leave, over both protocols, before and after their first token."""
    before = server.metric("requests_total", end="cancelled")
    for index in range(12):
        # So many answers that they do not come to their end before anybody notices.
        body = {"input_ids": [index], "max_tokens": 300, "end_id": -1, "n": 64, "stream": True}
        connection, response = server.open("generate_stream", body)
        if index % 2:
            response.readline()
        response.close()  # which holds the connection too
        connection.close()
    stay = {"input_ids": [3], "max_tokens": 300, "end_id": -1, "stream": True}
    left = over_grpc(server, installation, [{"inputs": stay, "leave_after": 1 + index % 3} for index in range(12)])
    assert all(one["error"] is None for one in left)
    server.wait_idle()
    until(lambda: server.metric("requests_total", end="cancelled") >= before + 12, "not all were cancelled")
    bodies = requests(8, seed=77)
    with ThreadPoolExecutor(8) as pool:
        for body, found in zip(bodies, pool.map(lambda b: server.generate(b, stream=True), bodies), strict=True):
            agrees(found, alone(loaded, body))


ENDED = "the engine process ended; it is being started again, try again in a moment"
STARTING = "the engine is being started again; try again in a moment"


def read_events(connection, response):
    with contextlib.closing(connection):
        return [json.loads(line[5:]) for line in response.read().decode().splitlines() if line.startswith("data: {")]


def test_a_killed_engine_is_told_over_all_protocols_and_started_again(server, loaded):
    """To those whose answers have begun, to one that is on its way, and to those that come before the engine is back."""
    # Answers of three clients, so many that they are not at their end before the kill.
    begun = {"input_ids": [5], "max_tokens": 300, "end_id": -1, "n": 128, "stream": True}
    asked = {"model": "mxcompile", "prompt": [5], "max_tokens": 300, "stream": True}
    grpc = GrpcClients(triton_venv() / "bin" / "python", server.grpc)
    restarts = server.metric("engine_restarts_total")
    with ThreadPoolExecutor() as pool:
        over_http = server.open("generate_stream", begun | {"client_id": "HTTP"})
        over_http[1].readline()
        over_openai = post(server.openai, "/v1/completions", asked | {"n": 128, "ignore_eos": True, "user": "OpenAI"})
        over_openai[1].readline()
        over_grpc = pool.submit(grpc.ask, begun | {"client_id": "gRPC"})
        until(lambda: server.metric("active_requests") + server.metric("waiting_requests") > 2.5 * 128, "no third")
        victim = server.engine_process()
        victim.suspend()
        on_its_way = pool.submit(server.post, "generate", {"input_ids": [5]})
        victim.kill()
        assert read_events(*over_http)[-1] == {"error": f"unavailable: {ENDED}"}
        assert read_events(*over_openai)[-1]["error"]["message"] == ENDED
        assert over_grpc.result().error == f"unavailable: {ENDED}"
        status, said = on_its_way.result()
        assert (status, said["error"]) in [(400, f"unavailable: {why}") for why in (ENDED, STARTING)]
    victim = held_in_its_start(server, victim)
    for stream in (False, True):
        assert triton_http(server, {"input_ids": [5]}, stream=stream).error == f"unavailable: {STARTING}"
        assert grpc.ask({"input_ids": [5], "stream": stream}).error == f"unavailable: {STARTING}"
        connection, response = post(server.openai, "/v1/completions", asked | {"stream": stream})
        with contextlib.closing(connection):
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert json.loads(response.read())["error"]["message"] == STARTING
    assert not ready(server)
    victim.resume()
    until(lambda: ready(server), "it does not come back")
    assert server.metric("engine_restarts_total") > restarts
    grpc.close()
    body = {"text_input": "back again", "max_tokens": 5}
    agrees(server.generate(body, stream=False), alone(loaded, body))


def held_in_its_start(server, before):
    """The engine process that comes after `before`, suspended before it is ready; another one if it was quicker than that."""

    def found():
        with contextlib.suppress(AssertionError, psutil.Error):
            process = server.engine_process()
            return process != before and not process.suspend()
        return False

    while True:
        until(found, "it is not started again")
        before = server.engine_process()
        if not server.metric("engine_ready"):
            return before
        before.kill()


def post(port, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    connection.request("POST", path, json.dumps(body), {"Connection": "close", "Content-Type": "application/json"})
    return connection, connection.getresponse()


def test_sigterm_lets_requests_end_and_sessions_survive(start_server, loaded, tmp_path):
    first = start_server("--state-dir", tmp_path, "--drain", LIMIT_S)
    start = {"input_ids": [9] * 40, "max_tokens": 4}
    said = [9] * 40 + first.generate(start | {"session_id": "kept", "session_start": True}, stream=False)["output_ids"]
    running = {"input_ids": [2], "max_tokens": 250, "end_id": -1}
    connection, response = first.open("generate_stream", running | {"stream": True})
    response.readline()
    first.process.terminate()
    lines = response.read().decode().splitlines()
    connection.close()
    events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert events[-1]["finish_reason"] == "length"
    assert events[-1]["num_output_tokens"] == 250
    assert first.stop() == 0, first.log.read_text()
    second = start_server("--state-dir", tmp_path)
    more = {"input_ids": [11], "max_tokens": 5}
    found = second.generate(more | {"session_id": "kept"}, stream=False)
    assert found["num_cached_tokens"] == len(said) - 1
    assert found["output_ids"] == alone(loaded, more, prompt=[*said, 11]).tokens
    assert second.stop() == 0, second.log.read_text()


@pytest.mark.parametrize("end", ["stopped", "Triton killed"])
def test_sessions_survive_also_when_answers_take_longer_than_they_may(start_server, tmp_path, end):
    """Triton then ends at once and leaves the engine to itself, as it does when it is killed."""
    server = start_server("--state-dir", tmp_path, "--drain", 1, "--openai-port", 0)
    server.generate({"input_ids": [9], "max_tokens": 2, "session_id": "kept", "session_start": True}, stream=False)
    running = {"input_ids": [2], "max_tokens": 300, "end_id": -1, "n": 128, "stream": True}
    connection, response = server.open("generate_stream", running)
    response.readline()
    engine = server.engine_process()
    if end == "stopped":
        server.process.terminate()
    else:
        next(p for p in psutil.Process(server.process.pid).children() if p.name() == "tritonserver").kill()
        server.expected = 3
    assert server.process.wait(LIMIT_S) == server.expected, server.log.read_text()
    response.close()
    connection.close()
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    assert len(list(tmp_path.glob("*.state"))) == 1


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("serve", None),
        ("tritonserver", "error: Triton ended by itself"),
        ("triton_python_backend_stub", "error: Triton's Python process ended by itself"),
    ],
)
def test_a_killed_process_takes_all_others_along(start_server, which, told):
    server = start_server("--openai-port", 0)
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert {"tritonserver", "triton_python_backend_stub"} <= {process.name() for process in family}
    if which == "serve":
        server.process.kill()
    else:
        next(process for process in family if process.name() == which).kill()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert not alive
    assert server.process.wait(LIMIT_S) != 0
    server.expected = server.process.returncode
    assert told is None or told in server.log.read_text()
