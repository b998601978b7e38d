"""Text to ids and back, streaming without broken characters, and the files of a folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_defs.checkpoint.random_tokenizer import write_tokenizer
from model_defs.presets import preset
from mxcompile.tokenizer import Tokenizer, TokenizerError

EOS, BOS, VOCAB = 510, 509, 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(preset("tiny"), path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.find(folder)


# Without "<": special tokens written in a text are special.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)


def test_every_id_has_a_meaning(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.eos_token_ids == (EOS,)
    assert tokenizer.encode("<beginning_of_sentence>user<end_of_sentence>\n")[0] == BOS
    assert [i for i in range(VOCAB) if tokenizer.decode([i])] == [i for i in range(VOCAB) if i not in (BOS, EOS, 511)]


@given(texts)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
def test_streamed_text_is_the_text_and_every_piece_is_whole(tokenizer, text):
    stream = tokenizer.detokenizer()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    for piece in pieces:
        assert "�" not in piece or "�" in text
        piece.encode("utf-8")
    assert "".join(pieces) + stream.finish() == text


@given(st.lists(st.integers(0, VOCAB + 3), max_size=60))
def test_any_tokens_stream_to_what_they_decode_to(tokenizer, tokens):
    """Bytes that never form a character, special tokens and unknown ids included."""
    stream = tokenizer.detokenizer()
    assert "".join(stream.push(token) for token in tokens) + stream.finish() == tokenizer.decode(tokens)


def test_a_character_over_three_tokens_appears_once_it_is_whole(tokenizer):
    stream = tokenizer.detokenizer()
    tokens = tokenizer.encode("x中y")
    assert len(tokens) == 5
    assert [stream.push(token) for token in tokens] == ["x", "", "", "中", "y"]


def test_output_cut_within_a_character_ends_in_a_replacement(tokenizer):
    stream = tokenizer.detokenizer()
    pieces = [stream.push(token) for token in tokenizer.encode("x中")[:-1]]
    assert (pieces, stream.finish(), stream.finish()) == (["x", "", ""], "�", "")


@given(texts)
def test_the_bytes_of_tokens_joined_are_the_text(tokenizer, text):
    assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()


def test_the_bytes_of_odd_tokens(tokenizer):
    call = tokenizer.token_id("<function_call>")
    assert tokenizer.token_bytes(call) == b"<function_call>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b"", "an id of a padded vocabulary"


def test_a_function_call_is_shown_and_other_special_tokens_are_not(tokenizer):
    tokens = tokenizer.encode("<beginning_of_sentence>a<function_call>b<end_of_sentence>")
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.push, tokens)) == tokenizer.decode(tokens) == "a<function_call>b"


def test_decoders_that_strip_the_first_space_stream_too(tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {"▁ab": 0, "▁": 1, "c": 2, "d": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="c"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, ())
    tokens = [0, 0, 2, 0, 3, 0]
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.push, tokens)) + stream.finish() == tokenizer.decode(tokens) == "ab abc abd ab"


def copy(folder, path, **files):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    for name, values in files.items():
        target = path / f"{name}.json"
        target.unlink(missing_ok=True)
        if values is not None:
            target.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"generation_config": {"eos_token_id": 7}}, (7,)),
        ({"generation_config": {}, "tokenizer_config": {"eos_token": {"content": "<end_of_document>"}}}, (511,)),
        ({"generation_config": None, "tokenizer_config": None}, (EOS,)),
        (
            {"generation_config": None, "tokenizer_config": {}, "special_tokens_map": {"eos_token": "<function_call>"}},
            (508,),
        ),
    ],
)
def test_where_the_end_of_sequence_comes_from(folder, tmp_path, files, expected):
    assert Tokenizer.find(copy(folder, tmp_path, **files)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "{"}, "tokenizer.json is not a tokenizer file"),
        ({"generation_config": "[1]"}, "generation_config.json must hold a JSON object"),
        ({"generation_config": "{"}, "generation_config.json is not valid JSON"),
        ({"generation_config": {"eos_token_id": "x"}}, "eos_token_id must hold token ids, not 'x'"),
    ],
)
def test_damaged_files_are_named(folder, tmp_path, files, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.find(copy(folder, tmp_path, **files))


def test_files_of_absurd_size_are_not_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mxcompile.tokenizer._LARGEST_FILE", 100)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has \d+ bytes"):
        Tokenizer.find(copy(folder, tmp_path))


def test_no_tokenizer_is_not_an_error(tmp_path):
    assert Tokenizer.find(tmp_path) is None


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\udcff")


def test_generation_streams_text(tokenizer):
    """The detokenizer in the generation loop, with a session that writes out a fixed text."""
    from engines.generation import GenerationConfig, generate

    script = tokenizer.encode("Größe 中文 END")

    class Script:
        vocab_size = VOCAB
        max_seq_len, max_batch_size, step = 100, 1, -1

        def new_state(self, batch):
            return SimpleNamespace(lengths=[0])

        def prefill(self, prompts, state, chunk=None):
            import numpy as np

            self.step += 1
            logits = np.zeros((1, VOCAB), np.float32)
            logits[0, [*script, EOS][self.step]] = 9
            return logits

        decode = prefill

    def run(**settings):
        config = GenerationConfig(stop_token_ids=tokenizer.eos_token_ids, **settings)
        pieces = []
        result = generate(Script(), [[1]], config, lambda e: pieces.append(e.text), detokenizer=tokenizer.detokenizer)
        assert "".join(pieces) == result[0].text
        return result[0].text, result[0].stop_reason

    assert run() == ("Größe 中文 END", EOS)
    assert run(stop_strings=["文 E"]) == ("Größe 中", "文 E")
