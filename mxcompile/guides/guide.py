"""What an answer must be, as a caller says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mxcompile.errors import MxcompileError

Kind = Literal["json", "json_schema", "regex", "choice", "grammar"]
KINDS: tuple[str, ...] = get_args(Kind)
MOST_BYTES = 1 << 19
"""UTF-8 bytes of a schema, expression, list or grammar at most."""


class GuideError(MxcompileError):
    """A guide that cannot be followed; says why."""


@dataclass(frozen=True)
class Guide:
    """One guide. By `kind`, `text` is:

    json: nothing; the answer is any JSON object. json_schema: the schema, as JSON. regex: an expression in the syntax of
    Rust's `regex` that the whole answer matches. choice: a JSON list of texts, of which the answer is one. grammar: one
    in llguidance's variant of Lark (with a rule `start`), or in GBNF (with `root ::= ...`).

    Raises GuideError for another kind, and for a text that is too long.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GuideError(f"{self.kind!r} is no kind of guide; known: {', '.join(KINDS)}")
        if self.kind == "json" and self.text:
            raise GuideError("the guide json takes no text; give json_schema with a schema")
        if self.kind != "json" and not self.text:
            raise GuideError(f"the guide {self.kind} needs a text")
        size = len(self.text.encode(errors="surrogatepass"))
        if size > MOST_BYTES:
            raise GuideError(f"the {self.kind} has {size} bytes; at most {MOST_BYTES} are taken")
