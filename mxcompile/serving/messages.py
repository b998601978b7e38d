"""From a message of the front to a request of the scheduler."""

from __future__ import annotations

import dataclasses
from typing import Any

from engines.generation import GenerationConfig
from mxcompile.loading import LoadedEngine
from mxcompile.serving.guided import read_bias, read_constraint
from mxcompile.serving.images import from_base64, place_images
from mxcompile.serving.relay import Relay, Send
from mxcompile.serving.requests import MOST_ANSWERS, Request, RequestError

MOST_LOGPROBS = 20  # alternatives to a token, as in OpenAI's API


def read_request(
    message: dict[str, Any], engine: LoadedEngine, send: Send, named: dict[str, str]
) -> tuple[Relay, Request]:
    """What a "generate" message asks for, and who turns its events into messages for `send`.

    Raises RequestError, GenerationError, EngineError or MxcompileError for what cannot be honoured.
    """
    text, ids = message.get("text_input"), message.get("input_ids")
    given = [value for value in (text, ids) if value is not None]
    if len(given) != 1:
        raise RequestError("give either text_input or input_ids")
    answers = message.get("n", 1)
    if not 1 <= answers <= MOST_ANSWERS:
        raise RequestError(f"n must be between 1 and {MOST_ANSWERS}, not {answers}")
    top = message.get("top_log_probs")
    if top is not None and not 0 <= top <= MOST_LOGPROBS:
        raise RequestError(f"top_log_probs must be between 0 and {MOST_LOGPROBS}, not {top}")
    stops = [] if message.get("end_id") == -1 else [message["end_id"]] if "end_id" in message else None
    config = GenerationConfig(
        max_new_tokens=message.get("max_tokens", 128),
        temperature=message.get("temperature", 0.0),
        top_k=message.get("top_k", 0),
        top_p=message.get("top_p", 1.0),
        repetition_penalty=message.get("repetition_penalty", 1.0),
        presence_penalty=message.get("presence_penalty", 0.0),
        frequency_penalty=message.get("frequency_penalty", 0.0),
        seed=message.get("seed", 0),
        stop_token_ids=engine.eos_token_ids if stops is None else tuple(stops),
        stop_strings=tuple(message.get("stop_words", ())),
        logprobs=top if top is not None else 0 if message.get("return_log_probs") else None,
        logit_bias=read_bias(message),
        constraint=read_constraint(message, engine),
    )
    scores = bool(message.get("prompt_log_probs"))
    if scores and top is None:
        raise RequestError("prompt_log_probs needs top_log_probs, the number of likeliest tokens to tell")
    tokenizer = engine.tokenizer
    files = [from_base64(f"images.{index}", encoded) for index, encoded in enumerate(message.get("images", ()))]
    prompt, images = place_images(given[0], engine.tokens(given[0]), files, engine.config.vision)
    prefix = ""
    if message.get("echo"):
        if tokenizer is None:
            raise RequestError("echo needs a tokenizer, which this engine was built without")
        prefix = text if text is not None else tokenizer.decode(prompt)
    relay = Relay(
        message["id"],
        send,
        stream=bool(message.get("stream")),
        answers=answers,
        details=False if top is None else tokenizer or True,
        prefix=prefix,
        **named,
    )
    request = Request(
        prompt,
        config,
        relay.of(0),
        session=message.get("session_id"),
        session_start=bool(message.get("session_start")),
        client=named["client"],
        prompt_logprobs=top if scores else None,
        images=images,
        # Each further answer has the next seed, so that it can be had alone.
        others=tuple(
            (dataclasses.replace(config, seed=(config.seed + index) % 2**64), relay.of(index))
            for index in range(1, answers)
        ),
    )
    return relay, request
