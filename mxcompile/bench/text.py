"""Texts that are measured on, and the tokenizer that reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mxcompile.bounded import read_bounded
from mxcompile.errors import MxcompileError
from mxcompile.tokenizer import Tokenizer


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises MxcompileError naming the file: unreadable, too large, not UTF-8, empty."""
    try:
        text = read_bounded(path).decode("utf-8")
    except OSError as error:
        raise MxcompileError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MxcompileError(f"{path}: is not a UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise MxcompileError(f"{path}: is empty")
    return text


def find_tokenizer(folders: Sequence[str | Path], instead: str) -> Tokenizer:
    """The first of the folders' tokenizers. `instead`: what to do without one. Raises MxcompileError when there is none, TokenizerError
    when its files are damaged."""
    for folder in folders:
        tokenizer = Tokenizer.find(folder)
        if tokenizer is not None:
            return tokenizer
    where = " and ".join(str(folder) for folder in folders)
    verb = "have" if len(folders) > 1 else "has"
    raise MxcompileError(f"{where} {verb} no tokenizer, so no text can be read; {instead}")
