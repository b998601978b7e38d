"""Guides are compiled where nobody waits for them: the thread for it, without a server."""

from __future__ import annotations

import threading

import pytest
from served import LIMIT_S

from mxcompile.serving import guided
from mxcompile.serving.guided import Compiling, read_bias
from mxcompile.serving.requests import RequestError


class Handler:
    """Holds each message until it may go on; notes what was done with which."""

    def __init__(self):
        self.done, self.began, self.may_go_on = [], threading.Semaphore(0), threading.Semaphore(0)
        self.compiling = Compiling(self.handle, self.refuse, lambda number: self.note("cancelled", number))
        self.changed = threading.Condition()

    def note(self, *what):
        with self.changed:
            self.done.append(what)
            self.changed.notify_all()

    def handle(self, message):
        self.began.release()
        assert self.may_go_on.acquire(timeout=LIMIT_S)
        self.note("handled", message["id"])
        if message["id"] == 13:
            raise ConnectionResetError

    def refuse(self, message, kind, reason):
        self.note("refused", message["id"], kind)

    def until(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.done) >= count, LIMIT_S)
        return self.done


def put(handler, *numbers):
    for number in numbers:
        handler.compiling.put({"id": number})


def test_messages_are_handled_in_order_and_a_front_that_is_gone_ends_nothing():
    handler = Handler()
    assert handler.compiling.idle
    put(handler, 3, 13, 1)
    assert not handler.compiling.idle
    handler.may_go_on.release(3)
    assert handler.until(3) == [("handled", 3), ("handled", 13), ("handled", 1)]


def test_what_is_cancelled_while_it_waits_or_is_compiled():
    handler = Handler()
    put(handler, 1, 2, 3)
    assert handler.began.acquire(timeout=LIMIT_S)  # 1 is being compiled
    assert handler.compiling.drop(1)
    assert handler.compiling.drop(2)
    assert not handler.compiling.drop(2)
    assert not handler.compiling.drop(7)
    handler.may_go_on.release(2)
    assert handler.until(4) == [("refused", 2, "cancelled"), ("handled", 1), ("cancelled", 1), ("handled", 3)]


def test_no_more_than_so_many_wait(monkeypatch):
    monkeypatch.setattr(guided, "MOST_WAITING", 2)
    handler = Handler()
    put(handler, 1)
    assert handler.began.acquire(timeout=LIMIT_S)
    put(handler, 2, 3, 4)
    assert handler.done == [("refused", 4, "unavailable")]
    handler.may_go_on.release(3)
    assert handler.until(4)[1:] == [("handled", 1), ("handled", 2), ("handled", 3)]


def test_biases_of_a_message():
    assert read_bias({}) == ()
    assert read_bias({"logit_bias_ids": [4, 2], "logit_bias_values": [1.5, -2.0]}) == ((4, 1.5), (2, -2.0))
    with pytest.raises(RequestError, match="there are 0 logit_bias_ids, but 1 logit_bias_values"):
        read_bias({"logit_bias_values": [1.0]})
