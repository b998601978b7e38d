"""What a caller may ask of generation, checked where it is written down."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.generation.constraint import Constraint


class GenerationError(Exception):
    """A prompt or a setting that generation cannot honour; the message names it and the limit."""

    exit_code = 2


class NotFiniteError(GenerationError):
    """The engine returned NaN or +inf logits: a wrong engine, not a wrong request."""

    exit_code = 1


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of one sequence. The defaults decode greedily.

    `temperature` 0 takes the most likely token; above 0, tokens are drawn from softmax(logits / temperature) after
    `top_k` (0: off) and then `top_p` (1: off) have cut it. `repetition_penalty` above 1 lowers every token of the
    prompt and of the output so far (Keskar et al. 2019, section 4.1). `presence_penalty` is taken off the logit of
    every token of the output so far, and `frequency_penalty` once for each time that it stands there. The same `seed`
    gives a prompt the same tokens in any run; in a batch, up to the last bits of the logits, which may tip a draw that
    is a near tie. `logprobs`: None reports none, n >= 0 reports the chosen token and the n most likely ones, all as
    the engine gave them: before bias, penalties, constraint and temperature. `logit_bias` is added to the logits of
    tokens, before penalties; given as a mapping or as pairs of token and number. `constraint` makes the Constraint that
    one answer must follow.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, low=1)
        _whole("top_k", self.top_k, low=0, hint=" (0 turns it off)")
        _whole("seed", self.seed, low=0, high=2**64 - 1)
        _number("temperature", self.temperature, low=0.0, hint=" (0 decodes greedily)")
        _number("top_p", self.top_p, low=0.0, above=True, high=1.0, hint=" (1 turns it off)")
        _number("repetition_penalty", self.repetition_penalty, low=1e-3, high=1e3, hint=" (1 turns it off)")
        _number("presence_penalty", self.presence_penalty, low=-100.0, high=100.0, hint=" (0 turns it off)")
        _number("frequency_penalty", self.frequency_penalty, low=-100.0, high=100.0, hint=" (0 turns it off)")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, low=0)
        for name in ("stop_token_ids", "stop_strings"):
            object.__setattr__(self, name, _list(name, getattr(self, name)))
        for token in self.stop_token_ids:
            _whole("a stop token id", token, low=0)
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise GenerationError(f"a stop string must be a non-empty string, not {text!r}")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for token, value in self.logit_bias:
            _whole("a token of logit_bias", token, low=0)
            _number("a value of logit_bias", value, low=-100.0, high=100.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Settings from plain values (a request, a file). Raises GenerationError on an unknown name."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise GenerationError(f"unknown generation setting {unknown[0]!r}")
        return cls(**values)


def _pairs(bias: Any) -> tuple[tuple[Any, Any], ...]:
    try:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        return tuple((token, value) for token, value in pairs)
    except (TypeError, ValueError):
        raise GenerationError(f"logit_bias must give tokens numbers, as {{token: number}}, not {bias!r}") from None


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise GenerationError(f"{name} must be a list, not {value!r}")
    return tuple(value)


def _whole(name: str, value: Any, *, low: int, high: int | None = None, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise GenerationError(f"{name} must be a whole number {bounds}{hint}, not {value!r}")


def _number(
    name: str, value: Any, *, low: float, above: bool = False, high: float | None = None, hint: str = ""
) -> None:
    # math.isfinite raises at whole numbers beyond the largest float.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or value < low or (above and value == low) or (high is not None and value > high):
        bounds = f"above {low:g}" if above else f"of at least {low:g}"
        if high is not None:
            bounds += f" and at most {high:g}"
        raise GenerationError(f"{name} must be a number {bounds}{hint}, not {value!r}")
