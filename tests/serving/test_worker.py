"""The engine process's own part, without a server around it."""

from __future__ import annotations

import socket

import pytest

from mxcompile.serving import wire
from mxcompile.serving.wire import Wire
from mxcompile.serving.worker import Settings, Worker


@pytest.fixture
def ends(loaded):
    """A worker, and the other end of its wire."""
    ours, theirs = socket.socketpair()
    yield Worker(loaded, Settings("", cache_bytes=0), Wire(theirs)), Wire(ours)
    ours.close()
    theirs.close()


def test_an_answer_too_long_to_send_fails_alone(ends, monkeypatch):
    worker, front = ends
    monkeypatch.setattr(wire, "LARGEST_FRAME", 2000)
    asked = {"input_ids": [1, 2, 3], "max_tokens": 40, "end_id": -1}
    worker._generate({"id": 1, **asked, "top_log_probs": 20})
    worker._generate({"id": 2, **asked})
    while not worker._scheduler.idle:
        worker._scheduler.step()
    worker._flush()
    first, second = front.receive(), front.receive()
    assert [first[0]["is"], first[0]["id"]] == ["failed", 1]
    assert "too long to send; ask for fewer" in first[0]["message"]
    assert [second[0]["is"], second[0]["id"], second[0]["output_tokens"]] == ["end", 2, 40]
