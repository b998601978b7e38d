"""The tokenizer of a checkpoint or engine folder, and text that streams out token by token.

Only the `tokenizers` library reads `tokenizer.json`; no code and no Jinja template of the folder is ever run. Special
tokens and end-of-sequence ids come from the JSON files that published checkpoints carry
(reference/minimax01-facts.md, section 6).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxcompile.errors import MxcompileError

if TYPE_CHECKING:
    import tokenizers

FUNCTION_CALL = "<function_call>"  # special, but part of the output: it opens a call
_LARGEST_FILE = 1 << 28  # bytes; the published tokenizer.json has about 2**24


class TokenizerError(MxcompileError):
    """A tokenizer file that cannot be used; names the file."""


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        added = backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        # Ids that never show in text.
        self.hidden = frozenset(i for i, content in special.items() if content != FUNCTION_CALL)
        # Ids that no text is made of: a grammar must name them to allow them.
        self.special = frozenset({*special, *self.eos_token_ids})
        self._added = frozenset(added)
        self._bytes = _letters_of_bytes() if type(backend.decoder).__name__ == "ByteLevel" else None

    @classmethod
    def find(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of `folder`, or None when it has none. Raises TokenizerError when its files are damaged."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return None
        import tokenizers

        _check_size(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise TokenizerError(f"{path} is not a tokenizer file: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _eos_token_ids(Path(folder), backend))

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, special tokens included; a model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def byte_level(self) -> bool:
        """Whether every token stands for bytes of its own, wherever it is."""
        return self._bytes is not None

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact text."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in it are recognised; none is added."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # a lone surrogate, from bytes on the command line that are not UTF-8
            raise TokenizerError(f"the text is not valid Unicode at character {error.start}") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without special tokens, except the one that opens a function call."""
        return self._backend.decode([i for i in tokens if i not in self.hidden], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, which need not be whole characters; special tokens as they are written."""
        text = self._backend.id_to_token(token)
        if text is None:  # an id of a padded vocabulary
            return b""
        if token in self._added:
            return text.encode()
        if self._bytes is None:
            return self._backend.decode([token], skip_special_tokens=False).encode()
        return bytes(self._bytes[letter] for letter in text)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh incremental decoder for one sequence."""
        return IncrementalDetokenizer(self)


class IncrementalDetokenizer:
    """Streams the text of one sequence; the pieces joined are exactly `Tokenizer.decode` of all tokens.

    A character of several bytes may be spread over several tokens. A decoder shows an incomplete one as one U+FFFD at
    the end, so that last character is held back until a later token completes or replaces it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A decoder may treat the first token of a list in its own way (strip a space), so decoding starts one settled
        # stretch before the new tokens: _tokens is that stretch, then the open tokens.
        self._tokens: list[int] = []
        self._settled = 0  # leading entries of _tokens that are the stretch before
        self._shown = 0  # characters of the decoded _tokens that are already out

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty."""
        if token in self._tokenizer.hidden:
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("�"):
            return self._show(text[:-1])
        piece = self._show(text)
        if piece:
            self._tokens = self._tokens[self._settled :]
            self._settled = len(self._tokens)
            self._shown = len(self._tokenizer.decode(self._tokens))
        return piece

    def finish(self) -> str:
        """What is still open: at most the U+FFFD of bytes that never became a character."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece


def _letters_of_bytes() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones stand for themselves, the others, in
    order, for the code points from 256 on (Radford et al. 2019, `encoder.py` of GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _eos_token_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """Ids that end a sequence, from the first file that names any."""
    named = _read(folder / "generation_config.json").get("eos_token_id")
    if named is not None:
        ids = named if isinstance(named, list) else [named]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise TokenizerError(
                f"{folder / 'generation_config.json'}: eos_token_id must hold token ids, not {named!r}"
            )
        return ids
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read(folder / name).get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and (found := backend.token_to_id(content)) is not None:
            return [found]
    found = backend.token_to_id("<end_of_sentence>")
    return [] if found is None else [found]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file."""
    if not path.is_file():
        return {}
    _check_size(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return values


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise TokenizerError(f"{path} has {size} bytes; a tokenizer file has at most {_LARGEST_FILE}")
