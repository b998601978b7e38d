"""A tokenizer for checkpoints that are made, not trained: every id of the vocabulary is readable text or a special
token.

Byte-level BPE like the published one: the 256 bytes, then merges for every pair and triple of lower-case letters
until the vocabulary is full, with MiniMax's special tokens at the ids that the model configuration gives them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

from mxcompile.chat import BEGIN, END
from mxcompile.tokenizer import FUNCTION_CALL

UNKNOWN = "<end_of_document>"
IMAGE = "<image>"


def write_byte_tokenizer(folder: str | Path, vocab_size: int, bos_token_id: int, eos_token_id: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json for a vocabulary of at least 261 ids."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    special = {bos_token_id: BEGIN, eos_token_id: END}
    rest = iter(i for i in range(vocab_size - 1, -1, -1) if i not in special)
    for content in (UNKNOWN, FUNCTION_CALL, IMAGE):
        special[next(rest)] = content
    plain_ids = [i for i in range(vocab_size) if i not in special]
    symbols = [byte_symbols()[byte] for byte in range(256)]
    if len(plain_ids) < len(symbols):
        raise ValueError(f"a byte tokenizer needs a vocabulary of at least 261 ids, not {vocab_size}")
    merges: list[tuple[str, str]] = []
    for left, right in _merges():
        if len(symbols) == len(plain_ids):
            break
        merges.append((left, right))
        symbols.append(left + right)
    vocabulary = dict(zip(symbols, plain_ids, strict=False))
    vocabulary |= {content: i for i, content in special.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special[i] for i in sorted(special)])
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": BEGIN,
            "eos_token": END,
            "unk_token": UNKNOWN,
            "model_max_length": 40960000,
        },
    )
    _write(folder / "generation_config.json", {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id})


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE: itself, or one from U+0100 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of lower-case letters, pairs of other characters, then triples, in a fixed order."""
    yield from product(ascii_lowercase, ascii_lowercase)
    space = byte_symbols()[ord(" ")]
    yield from product([space], ascii_lowercase + ascii_uppercase + digits)
    yield from product(digits, digits)
    for pair in product(ascii_lowercase, ascii_lowercase):
        yield from product(["".join(pair)], ascii_lowercase)


def _write(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
