"""From a request's events to the messages that leave the engine process, and its line in the log."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from engines.generation import TokenEvent, TokenLogprobs
from mxcompile.serving.requests import Event, Failed, Finished, PromptRead
from mxcompile.tokenizer import Tokenizer

logger = logging.getLogger("mxcompile.serving")
_LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has no word for; OpenAI's own convention
Send = Callable[[list[dict[str, Any]]], None]


class Relay:
    """The answers to one request. A streamed answer's last token travels with its end."""

    def __init__(
        self,
        number: int,
        send: Send,
        *,
        stream: bool = False,
        answers: int = 1,
        details: Tokenizer | bool = False,
        prefix: str = "",
        **named: str,
    ) -> None:
        """`number` goes into every message. `details`: also describe each token, with the tokenizer's text for it if
        there is one. `prefix` stands before the text of every answer. `named` goes into the log.
        """
        self._number, self._send, self._stream, self._details = number, send, stream, details
        self._named = {name: value for name, value in named.items() if value}
        self._open, self._failed, self._answers = answers, False, answers
        self._prefixes = [prefix] * answers
        self._prompt: list[str] = []  # descriptions of the prompt's tokens, which precede those of every answer
        self._tells_prompt = [True] * answers
        self._last: list[TokenEvent | None] = [None] * answers
        self._totals = {"prompt_tokens": 0, "cached_tokens": 0, "output_tokens": 0}
        self._arrived = time.monotonic()
        self._first: float | None = None

    def of(self, answer: int) -> Callable[[Event], None]:
        """The receiver of one answer's events."""
        return lambda event: self._receive(answer, event)

    def refuse(self, kind: str, message: str) -> None:
        """End the request before it began."""
        self._log(finish_reason=kind)
        self._message({"is": "failed", "kind": kind, "message": message})

    def _receive(self, answer: int, event: Event) -> None:
        match event:
            case PromptRead(tokens, logprobs):
                self._prompt = self._describe(tokens, [None, *logprobs])
            case TokenEvent():
                self._first = self._first or time.monotonic() - self._arrived
                self._last[answer] = event
                if self._stream and event.finish_reason is None:
                    logprobs = [event.logprobs] if event.logprobs is not None else []
                    self._tell(answer, {"is": "token"}, event.text, [event.token], logprobs)
            case Finished(result, cached):
                text, ids, logprobs = result.text or "", result.tokens, result.logprobs
                if self._stream:
                    last = self._last[answer]
                    assert last is not None
                    is_stop = isinstance(result.stop_reason, int)
                    text, ids, logprobs = last.text, [] if is_stop else ids[-1:], [] if is_stop else logprobs[-1:]
                ends = {"prompt_tokens": result.prompt_tokens, "cached_tokens": cached}
                self._totals |= ends
                self._totals["output_tokens"] += len(result.tokens)
                self._open -= 1
                if not self._open:
                    self._log(finish_reason=result.finish_reason, **self._totals)
                ends |= {"output_tokens": len(result.tokens)}
                head = {"is": "end", "final": not self._open, "finish_reason": result.finish_reason} | ends
                self._tell(answer, head, text, ids, logprobs)
            case Failed(kind, message):
                if not self._failed:  # it comes once for each answer
                    self._failed = True
                    self.refuse(kind, message)

    def _tell(
        self, answer: int, head: dict[str, Any], text: str, ids: list[int], logprobs: list[TokenLogprobs]
    ) -> None:
        text, self._prefixes[answer] = self._prefixes[answer] + text, ""
        message = head | {"text": text, "ids": ids, "log_probs": [entry.chosen for entry in logprobs]}
        if self._answers > 1:
            message["choice"] = answer
        if self._details is not False:
            message["details"] = self._describe(ids, logprobs)
            if self._tells_prompt[answer]:
                self._tells_prompt[answer] = False
                message["details"] = self._prompt + message["details"]
        self._message(message)

    def _describe(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[str]:
        tokenizer = self._details if isinstance(self._details, Tokenizer) else None
        return [json.dumps(describe(*pair, tokenizer)) for pair in zip(tokens, logprobs, strict=True)]

    def _message(self, message: dict[str, Any]) -> None:
        self._send([message | {"id": self._number}])

    def _log(self, **values: Any) -> None:
        seconds = {"first_token_s": self._first, "total_s": time.monotonic() - self._arrived}
        seconds = {name: round(value, 4) for name, value in seconds.items() if value is not None}
        answers = {"answers": self._answers} if self._answers > 1 else {}
        logger.info(json.dumps({"event": "request", "id": self._number} | self._named | answers | values | seconds))


def describe(token: int, logprobs: TokenLogprobs | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A token as the value of the output `token_details`: id, text, bytes, log-probability, and the likeliest ones. A
    prompt's first token has no log-probability.
    """

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = None if tokenizer is None else tokenizer.token_bytes(token)
        text = f"token_id:{token}" if data is None else data.decode(errors="replace")
        logprob = None if logprob is None else max(logprob, _LOWEST_LOGPROB)
        return {"id": token, "token": text, "bytes": None if data is None else list(data), "logprob": logprob}

    if logprobs is None:
        return entry(token, None) | {"top": []}
    return entry(token, logprobs.chosen) | {"top": [entry(*one) for one in logprobs.top]}
