"""`mxcompile validate` on an engine of one layer: verdict, files and exit codes."""

from __future__ import annotations

import json

import pytest

from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "one-layer"
    build(tiny_checkpoint, folder, layers=1, max_batch_size=4, max_seq_len=140, threads=2)
    return folder


def test_an_engine_that_agrees(mxcompile, engine, tiny_checkpoint, tmp_path):
    files = ("--json", tmp_path / "v.json", "--html", tmp_path / "v.html")
    command = ("validate", engine, "--against", tiny_checkpoint, "--quick", "--threads", 2)
    refused = mxcompile(*command, "--lengths", "8,x")
    assert refused.returncode == 2
    assert "'x' is not a number of tokens" in refused.stderr
    done = mxcompile(*command, "--lengths", "5, 66", "-v", *files)
    assert done.returncode == 0, done.stderr
    assert "The engine agrees with the PyTorch definition" in done.stdout
    assert "Prefill logits against PyTorch" in done.stdout
    assert "greedy:" in done.stderr
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["passed"] is True
    assert found["options"]["quick"] is True
    assert {item["case"] for item in found["positions"]} == {"5 tokens", "66 tokens"}
    page = (tmp_path / "v.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_an_engine_of_another_checkpoint(mxcompile, engine, tmp_path):
    create_checkpoint("tiny", tmp_path / "other", seed=99)
    command = ("validate", engine, "--against", tmp_path / "other", "--quick", "--threads", 2)
    refused = mxcompile(*command)
    assert refused.returncode == 2
    assert "built from another checkpoint" in refused.stderr
    assert refused.stderr.count("\n") == 1
    differs = mxcompile(*command, "--force", "--json", "-")
    assert differs.returncode == 1, differs.stderr
    found = json.loads(differs.stdout)
    assert found["passed"] is False
    assert found["fault"]["layer"] == 0
