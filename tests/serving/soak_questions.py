"""What the soak asks, and what the engine alone answers to it."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.generation import GenerationResult
from mxcompile.chat import render
from mxcompile.loading import LoadedEngine

WORDS = "the lightning layers remember what softmax would have to look up again and again".split()
NOISE = 1e-4  # on logits: five times what batching was seen to move them by (docs/serving.md)
SHAKES = 3
Body = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A request in Triton's fields, and its answer. `messages`: the same as a chat, when it is one."""

    body: Body
    answer: GenerationResult
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class Questions:
    """`conversations`: turns of one session each. `unsteady`: questions left out because a tie decides them."""

    single: list[Question] = field(default_factory=list)
    conversations: list[list[Question]] = field(default_factory=list)
    unsteady: int = 0


class Shaken:
    """A session whose logits are off by a little: the answer that survives it does not hang on how a batch rounds."""

    def __init__(self, session: Any, seed: int) -> None:
        self._session, self._random = session, np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, *args: Any, **settings: Any) -> np.ndarray:
        return self._shake(self._session.prefill(*args, **settings))

    def decode(self, *args: Any, **settings: Any) -> np.ndarray:
        return self._shake(self._session.decode(*args, **settings))

    def forward(self, *args: Any, **settings: Any) -> Any:
        result = self._session.forward(*args, **settings)
        return dataclasses.replace(result, logits=self._shake(result.logits))

    def _shake(self, logits: np.ndarray) -> np.ndarray:
        return logits + self._random.normal(scale=NOISE, size=logits.shape).astype(logits.dtype)


def ask(loaded: LoadedEngine, count: int, conversations: int, seed: int) -> Questions:
    """`count` single questions, a third of them behind one of a few long shared prefixes, and `conversations`."""
    source = random.Random(seed)
    prefixes = [_ids(source, length) for length in (64, 100, 160)]
    single: list[Question] = []
    unsteady = 0
    while len(single) < count:
        body, messages = _body(source), None
        match source.randrange(6):
            case 0 | 1:
                body["input_ids"] = source.choice(prefixes) + _ids(source, source.randint(1, 20))
            case 2:
                body["input_ids"] = _ids(source, source.choice([1, 3, 10, 40, 120, 250]))
            case 3:
                messages = [{"role": "user", "content": _text(source, 6)}]
                body["text_input"] = render(messages)
            case _:
                body["text_input"] = _text(source, source.choice([1, 4, 12, 30]))
        if source.randrange(4) == 0:
            body["stop_words"] = ["e", "th"]
        answer = _steady(loaded, body, [body.get("input_ids", body.get("text_input"))])
        if answer is None:
            unsteady += 1
        else:
            single.append(Question(body, answer, messages))
    talks: list[list[Question]] = []
    while len(talks) < conversations:
        said: list[int] = []
        turns: list[Question] = []
        for _ in range(source.randint(2, 4)):
            body = _body(source) | {"input_ids": _ids(source, source.choice([1, 5, 40]))}
            said += body["input_ids"]
            answer = _steady(loaded, body, [said])
            if answer is None:
                break
            said += answer.tokens
            if isinstance(answer.stop_reason, int):  # drawn, though not said: the next turn follows it
                said.append(answer.stop_reason)
            turns.append(Question(body, answer))
        if len(turns) > 1:
            talks.append(turns)
        else:
            unsteady += 1
    return Questions(single, talks, unsteady)


def _body(source: random.Random) -> Body:
    body: Body = {"max_tokens": source.choice([1, 4, 12, 30])}
    if source.randrange(2):
        body |= {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "seed": source.randrange(2**63)}
    return body


def _steady(loaded: LoadedEngine, body: Body, prompts: list[Any]) -> GenerationResult | None:
    """The engine's answer; None when noise on its logits changes it."""
    settings = {key: body[key] for key in ("temperature", "top_k", "top_p", "seed") if key in body}
    settings |= {"max_new_tokens": body["max_tokens"], "stop_strings": tuple(body.get("stop_words", ())), "logprobs": 0}
    answer = loaded.generate(prompts, **settings)[0]
    for seed in range(SHAKES):
        shaken = dataclasses.replace(loaded, session=Shaken(loaded.session, seed))  # type: ignore[arg-type]
        if shaken.generate(prompts, **settings)[0].tokens != answer.tokens:
            return None
    return answer


def _ids(source: random.Random, length: int) -> list[int]:
    return [source.randrange(3, 500) for _ in range(length)]


def _text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))
