"""`bench --needle`: agreement on a good engine, disagreement on a damaged one, and bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from engines.onnxruntime.session import OrtSession
from mxcompile.bench.needle import _Pieces, needle, read_needle
from mxcompile.bench.results import write_json
from mxcompile.errors import MxcompileError


def test_a_good_engine_agrees_at_every_depth(engine, tmp_path):
    report = needle(engine, None, (5, 40, 200, 300), (0, 50, 100), threads=2)
    assert report.passed
    assert [(cell.length, cell.depth) for cell in report.cells] == [(n, d) for n in (40, 200) for d in (0, 50, 100)]
    assert all(cell.max_abs <= report.limit and cell.engine_rank == cell.reference_rank for cell in report.cells)
    assert {item["length"]: item["reason"] for item in report.not_run} == {
        300: "exceeds the engine's max_seq_len 200",
        5: "is too short for the key and the question (13 tokens)",
    }
    write_json(report.to_dict(), tmp_path / "n.json")
    assert read_needle(tmp_path / "n.json") == report


def test_an_engine_that_forgets_is_caught(engine, monkeypatch):
    prefill = OrtSession.prefill

    def forgets(self, prompts, state, chunk=None):
        return prefill(self, [prompt[-64:] for prompt in prompts], state, chunk)

    monkeypatch.setattr(OrtSession, "prefill", forgets)
    report = needle(engine, None, (40, 200), (0, 100), threads=2)
    assert not report.passed
    assert [cell.status for cell in report.cells] == ["agrees", "agrees", "differs", "differs"]


def test_logits_that_are_no_numbers_are_caught(engine, monkeypatch):
    prefill = OrtSession.prefill
    monkeypatch.setattr(OrtSession, "prefill", lambda *a, **k: prefill(*a, **k) * np.float32("nan"))
    report = needle(engine, None, (40,), (50,), threads=2)
    assert not report.passed
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["cells"][0]["max_abs"] is None


def test_text_as_haystack_needs_a_tokenizer(engine, tmp_path):
    (tmp_path / "text.txt").write_text("The sea was calm. ")
    report = needle(engine, None, (200,), (30,), haystack=tmp_path / "text.txt", threads=2)
    assert report.passed or report.not_run  # a byte-level tokenizer may need more than 200 tokens for the key
    bare = tmp_path / "engine"
    shutil.copytree(engine, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(MxcompileError, match="has no tokenizer"):
        needle(bare, None, (200,), (30,), haystack=tmp_path / "text.txt", threads=2)
    with pytest.raises(MxcompileError, match="between 0 and 100"):
        needle(engine, None, (40,), (101,), threads=2)


@pytest.mark.parametrize(("depth", "at"), [(0, 0), (50, 43), (100, 86)])
def test_where_the_key_lies(depth, at):
    prompt = _Pieces([7, 8, 9], [1, 2, 3, 4, 5], [6, 6, 6, 6]).prompt(100, depth)
    assert len(prompt) == 100
    assert prompt[at : at + 9] == [1, 2, 3, 4, 5, 6, 6, 6, 6]
    assert prompt[-5:] == [1, 2, 3, 4, 5]
    assert prompt.count(1) == 2
