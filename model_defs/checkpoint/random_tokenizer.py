"""A byte-level BPE tokenizer that covers a vocabulary exactly, for checkpoints with random weights.

It has the form of the released one (reference/minimax01-facts.md, section 6): every text can be encoded and every id
decoded. The merges are not learned; they join frequent letters first, so that English text becomes shorter than its
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from model_defs.config import ModelConfig
from model_defs.errors import CheckpointError

BOS, EOS, UNKNOWN, FUNCTION_CALL = (
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<end_of_document>",
    "<function_call>",
)
IMAGE = "<image>"  # of models with a vision half
SMALLEST_VOCABULARY = 256 + 4  # all bytes and the special tokens

_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # by frequency in English text
_SPACE = "\u0120"  # how byte-level tokenizers spell a space

# The message format of MiniMax-Text-01. System, user and function messages use their first content item only (facts,
# 6).
CHAT_TEMPLATE = (
    "{%- macro header(role) -%}"
    "{%- if role == 'system' -%}system ai_setting=assistant"
    "{%- elif role == 'user' -%}user name=user"
    "{%- elif role == 'assistant' -%}ai name=assistant"
    "{%- elif role == 'function' -%}system function_response=functions"
    "{%- else -%}{{ raise_exception('unknown role: ' + role) }}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{{- '<beginning_of_sentence>' + header(message['role']) + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- for item in message['content'] -%}{{- item['text'] -}}{%- endfor -%}"
    "{%- else -%}{{- message['content'][0]['text'] -}}{%- endif -%}"
    "{{- '<end_of_sentence>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<beginning_of_sentence>ai name=assistant\\n' -}}{%- endif -%}"
)


# MiniMax-VL-01's: every item of a message counts, and an image is its mark.
_FIRST_TEXT, _ALL_ITEMS = (
    "{%- else -%}{{- message['content'][0]['text'] -}}{%- endif -%}",
    "{%- else -%}{%- for item in message['content'] -%}"
    "{{- '<image>' if item['type'] == 'image' else item['text'] -}}{%- endfor -%}{%- endif -%}",
)
VL_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_FIRST_TEXT, _ALL_ITEMS)


def special_tokens(config: ModelConfig) -> dict[str, int]:
    """Ids of the special tokens: where the configuration says, else at the end of the vocabulary in the order function
    call, bos, eos, unknown.
    """
    last = config.vocab_size - 1
    wanted = {
        EOS: last - 1 if config.eos_token_id is None else config.eos_token_id,
        BOS: last - 2 if config.bos_token_id is None else config.bos_token_id,
        UNKNOWN: last,
        FUNCTION_CALL: last - 3,
    }
    if config.vision is not None:
        wanted = {IMAGE: config.vision.image_token_id} | wanted
    taken: dict[str, int] = {}
    for token, wish in wanted.items():
        free = (i for i in (wish, *range(last, -1, -1)) if i not in taken.values())
        taken[token] = next(free)
    return taken


def write_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json. Raises CheckpointError if the
    vocabulary is too small to hold all bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if config.vocab_size < SMALLEST_VOCABULARY:
        raise CheckpointError(
            f"a tokenizer needs a vocab_size of at least {SMALLEST_VOCABULARY}, not {config.vocab_size}; "
            "create the checkpoint without one"
        )
    special = special_tokens(config)
    free_ids = iter(sorted(set(range(config.vocab_size)) - set(special.values())))
    vocabulary = {token: next(free_ids) for token in sorted(pre_tokenizers.ByteLevel.alphabet())}
    merges = []
    for (left, right), token_id in zip(_merges(), free_ids, strict=False):
        vocabulary[left + right] = token_id
        merges.append((left, right))
    if len(vocabulary) + len(special) != config.vocab_size:
        raise CheckpointError(
            f"no tokenizer of {config.vocab_size} tokens can be made; create the checkpoint without one"
        )
    # The model knows the special tokens too: added ones keep the ids that it gives them.
    model = models.BPE(vocab=vocabulary | special, merges=merges, unk_token=None, fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in sorted(special, key=lambda t: special[t])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    settings = {
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE if config.vision is None else VL_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    others = {"additional_special_tokens": [FUNCTION_CALL, *([] if config.vision is None else [IMAGE])]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named | others, indent=2) + "\n", encoding="utf-8")


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs to join, most useful first: space and letter, two letters, other printable pairs, pairs of letter pairs."""
    seen: set[str] = set()
    printable = [chr(code) for code in range(33, 127)]

    def fresh(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for left, right in pairs:
            if left + right not in seen:
                seen.add(left + right)
                yield left, right

    letter_pairs = sorted(
        ((a, b) for a in _LETTERS for b in _LETTERS),
        key=lambda pair: (_LETTERS.index(pair[0]) + _LETTERS.index(pair[1]), pair),
    )
    yield from fresh((_SPACE, letter) for letter in _LETTERS)
    yield from fresh(iter(letter_pairs))
    yield from fresh((_SPACE, other) for other in printable)
    yield from fresh((a, b) for a in printable for b in printable)
    rank = {a + b: index for index, (a, b) in enumerate(letter_pairs)}
    joined = sorted(((a, b) for a in rank for b in rank), key=lambda pair: (rank[pair[0]] + rank[pair[1]], pair))
    yield from fresh(iter(joined))
