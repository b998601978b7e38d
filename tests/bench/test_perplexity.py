"""`bench --perplexity`: equal to an independent computation, different for a wrong engine, and clear about bad input."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.onnxruntime.session import OrtSession
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.bench.perplexity import cut, negative_log_likelihood, perplexity
from mxcompile.bench.perplexity_results import PerplexityReport, read_perplexity, verdict
from mxcompile.bench.results import write_json
from mxcompile.errors import MxcompileError
from mxcompile.tokenizer import Tokenizer

TEXT = "The sea was calm, and the lamp in the tower turned. " * 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "sea.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def measured(engine, text, tmp_path_factory):
    file = tmp_path_factory.mktemp("perplexity") / "p.json"
    backends = ("engine", "pytorch", "transformers")
    return perplexity(engine, text, backends=backends, context=60, threads=2, json_file=file), file


def test_every_side_against_transformers_and_pytorch_themselves(measured, checkpoint):
    """No session, no chunks, no code of the measurement: each segment whole, cross entropy by torch in fp64."""
    from mxcompile.backends.transformers import TransformersSession

    tokens = Tokenizer.find(checkpoint).encode(TEXT)
    assert len(tokens) > 150
    port = TransformersSession.load(checkpoint, threads=2).model
    ours = PyTorchSession.load(checkpoint, threads=2).model

    def by_port(ids):
        return port(input_ids=ids).logits[0]

    def by_definition(ids):
        count = ids.shape[1]
        lengths = torch.tensor([count]), torch.tensor([0])
        return ours(ids, *lengths, torch.arange(count)[None], ours.new_states(1, count))[0][0]

    report, _ = measured
    rows = {row["name"]: row for row in report.summary()}
    for logits_of, names in ((by_port, ["transformers"]), (by_definition, ["pytorch", "engine"])):
        total, start = 0.0, 0
        with torch.inference_mode():
            while start < len(tokens) - 1:
                ids = torch.tensor([tokens[start : start + 60]])
                wide = logits_of(ids)[:-1].double()
                total += float(torch.nn.functional.cross_entropy(wide, ids[0, 1:], reduction="sum"))
                start += 59
        expected = math.exp(total / (len(tokens) - 1))
        for name in names:
            assert rows[name]["tokens"] == len(tokens) - 1
            # 1e-6 of the logits' scale, as fp32 programs that add in different orders.
            assert rows[name]["perplexity"] == pytest.approx(expected, rel=2e-5), name
    assert report.passed
    assert abs(rows["engine"]["change"]) < 1e-4 < abs(rows["transformers"]["change"])  # full rotary: another model


def test_the_file_holds_what_was_found(measured):
    report, file = measured
    assert read_perplexity(file) == report
    stored = json.loads(file.read_text())
    assert stored["passed"] is True
    assert stored["summary"][0]["perplexity"] == report.summary()[0]["perplexity"]
    assert "predicts the text as PyTorch does" in verdict(report)


@given(st.integers(2, 300), st.integers(2, 40))
def test_every_token_but_the_first_is_predicted_once(count, context):
    segments = cut(list(range(count)), context)
    assert [token for segment in segments for token in segment[1:]] == list(range(1, count))
    assert all(2 <= len(segment) <= context for segment in segments)


def test_log_likelihood_of_huge_and_infinite_logits():
    logits = np.array([[3e4, 0.0, -3e4], [1.0, 1.0, 1.0], [np.nan, 0.0, 0.0]], np.float32)
    found = negative_log_likelihood(logits, [1, 2, 1])
    assert found[:2] == pytest.approx([3e4, math.log(3)])
    assert np.isnan(found[2])


def test_a_wrong_engine_differs(engine, text, monkeypatch):
    forward = OrtSession.forward

    def wrong(self, *arguments, **options):
        result = forward(self, *arguments, **options)
        result.logits[..., 7] += 0.5
        return result

    monkeypatch.setattr(OrtSession, "forward", wrong)
    report = perplexity(engine, text, threads=2)
    assert not report.passed
    assert "otherwise than PyTorch" in verdict(report)


def test_logits_that_are_no_numbers_have_no_perplexity(engine, text, monkeypatch, tmp_path):
    forward = OrtSession.forward

    def broken(self, *arguments, **options):
        result = forward(self, *arguments, **options)
        result.logits[..., 3, :] = np.nan
        return result

    monkeypatch.setattr(OrtSession, "forward", broken)
    report = perplexity(engine, text, threads=2, json_file=tmp_path / "p.json")
    assert not report.passed
    assert read_perplexity(tmp_path / "p.json").engine_row["perplexity"] is None
    assert "no number" in verdict(report)


def test_an_interrupted_run_goes_on_where_it_stopped(engine, text, measured, tmp_path, monkeypatch):
    file, forward, calls = tmp_path / "p.json", PyTorchSession.forward, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    backends = ("engine", "pytorch", "transformers")
    how = {"backends": backends, "context": 60, "threads": 2, "json_file": file}
    monkeypatch.setattr(PyTorchSession, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perplexity(engine, text, **how)
    stopped = read_perplexity(file)
    assert [len(side.nll) for side in stopped.sides] == [stopped.text["segments"], 1]
    assert stopped.text["segments"] > 2
    assert not stopped.finished
    assert not stopped.passed
    with pytest.raises(MxcompileError, match="unfinished run; go on with --resume"):
        perplexity(engine, text, **how)
    with pytest.raises(MxcompileError, match="its context were 60, not 50"):
        perplexity(engine, text, **how | {"context": 50}, resume=True)
    done = perplexity(engine, text, **how, resume=True)
    assert done.finished
    assert done.interruptions == 1
    assert done.summary() == measured[0].summary()


def test_an_execution_error_is_tried_again_once(engine, text, monkeypatch):
    forward, calls = OrtSession.forward, []

    def flaky(self, *arguments, **options):
        calls.append(1)
        if len(calls) in (1, 4, 5):
            raise RuntimeError("a fault")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(OrtSession, "forward", flaky)
    report = perplexity(engine, text, threads=2, context=60)
    assert report.side("engine").left_out == "failed twice: RuntimeError: a fault"
    assert len(report.side("engine").failures) == 3
    assert len(report.side("pytorch").nll) == report.text["segments"]
    assert not report.passed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "is not a UTF-8 text"),
        (b" \n", "is empty"),
        (b"a", "too short: it has 1 token"),
    ],
)
def test_texts_that_cannot_be_measured_on(engine, tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(MxcompileError, match=message):
        perplexity(engine, tmp_path / "t.txt")


def test_other_bad_input(engine, checkpoint, text, tmp_path, measured):
    with pytest.raises(MxcompileError, match="cannot be read: No such file"):
        perplexity(engine, tmp_path / "none.txt")
    with pytest.raises(MxcompileError, match="cannot be read: Is a directory"):
        perplexity(engine, tmp_path)
    with pytest.raises(MxcompileError, match="between 2 and the engine's 200 tokens, not 201"):
        perplexity(engine, text, context=201)
    for name, source in (("engine", engine), ("checkpoint", checkpoint)):
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "tokenizer.json").unlink()
    with pytest.raises(MxcompileError, match="have no tokenizer, so no text can be read"):
        perplexity(tmp_path / "engine", text, tmp_path / "checkpoint")
    found = perplexity(engine, text, tmp_path / "checkpoint", threads=2)  # by the engine's own tokenizer
    assert found.passed, verdict(found)
    write_json(measured[0].to_dict() | {"schema_version": 9}, tmp_path / "p.json")
    with pytest.raises(MxcompileError, match=r"p\.json: it has schema version 9, this mxcompile reads 1"):
        read_perplexity(tmp_path / "p.json")
    with pytest.raises(MxcompileError, match="the file is damaged"):
        PerplexityReport.from_dict(measured[0].to_dict() | {"sides": [{"name": 3}]})


def test_a_tokenizer_of_another_model_is_refused(engine, checkpoint, text, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    values = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    values["added_tokens"].append(
        {"id": 5000, "content": "lamp", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    )  # fmt: skip
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(MxcompileError, match="the tokenizer is of another model"):
        perplexity(engine, text, tmp_path / "c")


def test_the_command(mxcompile, engine, text, tmp_path):
    done = mxcompile("bench", engine, "--perplexity", text, "--threads", 2, "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    assert "The engine predicts the text as PyTorch does" in done.stdout
    assert read_perplexity(tmp_path / "p.json").finished
    for arguments, message in (
        (("--perplexity", tmp_path / "none.txt"), "none.txt"),
        (("--perplexity", text, "--needle"), "separate runs"),
        (("--context", 100), "--context belongs to --perplexity"),
    ):
        refused = mxcompile("bench", engine, *arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
