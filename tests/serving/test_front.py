"""How the OpenAI front reads Triton's stream, whatever pieces it comes in."""

from __future__ import annotations

import asyncio
import itertools
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile.serving.openai.triton import Answer, ApiError


class Pieces(httpx.AsyncByteStream):
    def __init__(self, data: bytes, cuts: list[int]) -> None:
        ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        self._parts = [data[a:b] for a, b in itertools.pairwise(ends)]

    async def __aiter__(self):
        for part in self._parts:
            yield part


def read(events: list[dict], cuts: list[int], answers: int = 1) -> list[dict]:
    data = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events).encode()

    async def run() -> list[dict]:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Pieces(data, cuts)))
        async with httpx.AsyncClient(transport=transport, base_url="http://triton") as client:
            answer = await Answer.ask(client, "m", {"n": answers} if answers > 1 else {})
            return [values async for values in answer]

    return asyncio.run(run())


@given(
    st.lists(st.text(st.sampled_from('a\n\r\u2028\u2029\x85\x1c\x0bé𝄞"data: {'), max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 300), max_size=12),
)
def test_text_arrives_as_it_was(texts, cuts):
    events = [{"text_output": text} for text in texts] + [{"text_output": "", "finish_reason": "stop"}]
    assert read(events, cuts) == events


def test_a_failure_in_the_stream_keeps_its_kind():
    with pytest.raises(ApiError, match="the engine process ended") as failed:
        read([{"text_output": "a"}, {"error": "unavailable: the engine process ended"}], [10, 40])
    assert failed.value.status == 503


@pytest.mark.parametrize("answers", [1, 3])
def test_half_an_answer_is_not_taken_for_a_whole_one(answers):
    """A stream that ends in good order before all answers have ended, or within an event."""
    whole = [{"text_output": "a", "finish_reason": "stop", "choice_index": index} for index in range(answers)]
    assert read(whole, [], answers) == whole
    with pytest.raises(ApiError, match="the engine server ended") as failed:
        read([{"text_output": "a"}, *whole[1:]], [], answers)
    assert failed.value.status == 503
