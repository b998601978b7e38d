"""The one place that knows llguidance: a guide to the library's grammar, and a grammar to a matcher.

Sources: the library's own docs/json_schema.md, docs/syntax.md and docs/special_tokens.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mxcompile.errors import EnvironmentProblem
from mxcompile.guides.guide import Guide, GuideError

if TYPE_CHECKING:
    import llguidance
    from llguidance._lib import JsonCompileOptions  # in its type stub only

# A blank, or a line break with an indentation: without a bound, a model may write blanks for ever. Where a schema has
# "x-guidance", that decides.
WHITESPACE = r"\x20|\n[\x20\t]{0,40}"
_LONGEST_REASON = 300  # characters
# Lines of the library's messages that show the source or the parser's inside.
_NOISE = re.compile(r"\s*(\d+ \| .*|\^|<non-verbose/>|\(no grammar.*)?\s*")


def check_installed() -> None:
    """Raises EnvironmentProblem when the library is not there."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "answers that follow a schema or grammar need llguidance, which is not installed: "
            "pip install 'mxcompile[structured]'"
        ) from error


def grammar_of(guide: Guide) -> str:
    """The guide in the library's own form, not checked as a grammar. Raises GuideError for what is not even JSON or GBNF."""
    from llguidance import LLMatcher

    options: JsonCompileOptions = {"whitespace_pattern": WHITESPACE}
    match guide.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=options)
        case "json_schema":
            if not isinstance(_parsed(guide), dict):
                raise GuideError("json_schema: must be a JSON object")
            return LLMatcher.grammar_from_json_schema(guide.text, defaults=options)
        case "regex":
            return LLMatcher.grammar_from_regex(guide.text)
        case "choice":
            texts = _parsed(guide)
            if not (isinstance(texts, list) and texts and all(map(_is_text, texts))):
                raise GuideError("choice: must be a list of texts that are not empty")
            return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(literal, texts)))
        case _:
            from llguidance.gbnf_to_lark import any_to_lark

            try:
                return LLMatcher.grammar_from_lark(any_to_lark(guide.text))
            except Exception as error:  # of the library's own kind, which it does not export
                raise GuideError(f"grammar: {shortened(str(error))}") from error


def literal(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def make_tokenizer(
    tokens: Sequence[bytes], special: Sequence[int], encode: Callable[[bytes], list[int]]
) -> llguidance.LLTokenizer:
    """The library's view of a vocabulary: bytes of each id, empty for those that never stand for text.

    The last id must be nobody's: the library allows it where an answer may end.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    class Vocabulary:
        def __init__(self) -> None:
            self.tokens, self.bos_token_id = tokens, None
            self.eos_token_id = len(tokens) - 1
            self.special_token_ids = [*special, self.eos_token_id]

        def __call__(self, data: bytes) -> list[int]:
            return encode(data)

    return LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=len(tokens))


def make_matcher(tokenizer: llguidance.LLTokenizer, grammar: str, kind: str) -> llguidance.LLMatcher:
    """Compile a grammar; other threads run meanwhile. Raises GuideError with the library's reason."""
    from llguidance import LLMatcher, LLParserLimits

    # Compiling may take at most half a second of fuel, a step some 25 ms, and the states of one answer some 40 MB.
    limits = LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GuideError(f"{kind}: {shortened(matcher.get_error())}")
    return matcher


def shortened(message: str) -> str:
    """One line of the library's message."""
    lines = [line.strip() for line in message.splitlines() if not _NOISE.fullmatch(line)]
    text = "; ".join(line.rstrip(":;, ") for line in lines if line)
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."


def _is_text(value: object) -> bool:
    """Not empty, and of whole characters."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _parsed(guide: Guide) -> object:
    try:
        return json.loads(guide.text)
    except (ValueError, RecursionError) as error:
        raise GuideError(f"{guide.kind}: is not JSON ({error})") from error
