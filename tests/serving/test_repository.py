"""What `mxcompile triton` writes, refuses and leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from served import LIMIT_S, Served, free_ports

from engines.errors import EngineError
from mxcompile.errors import EnvironmentProblem, MxcompileError
from mxcompile.serving.triton.repository import write_repository
from mxcompile.serving.triton.server import TritonServer
from mxcompile.serving.worker import Settings


def command(*arguments):
    asked = [sys.executable, "-m", "mxcompile", "triton", *map(str, arguments)]
    return subprocess.run(asked, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_the_repository_is_whole_and_loads_without_the_engine_folder(engine, tmp_path):
    from mxcompile.loading import load

    done = command(engine, "-o", tmp_path / "repo", "--name", "minimax", "--max-queue", 3)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "repo" / "minimax" / "1" / "engine"
    assert not copy.is_symlink()
    assert load(copy, threads=1).generate("a", max_new_tokens=2).tokens
    config = (tmp_path / "repo" / "minimax" / "config.pbtxt").read_text()
    parameters = dict(re.findall(r'key: "(\w+)" value \{ string_value: "(.*)" \}', config))
    assert parameters["python"] == sys.executable
    assert json.loads(parameters["max_queue"]) == 3
    curl = re.search(r"generate -d '(.*)'", (tmp_path / "repo" / "README.md").read_text())
    assert curl is not None
    inputs = set(re.findall(r'input \[ \{ name: "(\w+)"', config))
    assert set(json.loads(curl.group(1))) <= inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--state-dir-limit", 5], "--state-dir-limit: give --state-dir too"),
        (["--state-dir", "states", "--cache-mib", 0], "give one of the two"),
        (["--max-queue-per-client", 0], "--max-queue-per-client"),
    ],
)
def test_settings_that_make_no_sense_are_refused(engine, tmp_path, options, message):
    done = command(engine, "-o", tmp_path / "repo", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "repo").exists()


def test_other_folders_are_not_touched(engine, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    done = command(engine, "-o", tmp_path / "mine", "--force")
    assert done.returncode == 2
    assert "no model repository of mxcompile" in done.stderr
    assert (tmp_path / "mine" / "file").read_text() == "precious"
    write_repository(engine, tmp_path / "repo", link=True)
    with pytest.raises(MxcompileError, match="--force"):
        write_repository(engine, tmp_path / "repo", link=True)
    write_repository(engine, tmp_path / "repo", link=True, force=True)
    with pytest.raises(MxcompileError, match="no model name"):
        write_repository(engine, tmp_path / "other", name="../up")
    with pytest.raises(EngineError, match="no such engine"):
        write_repository(tmp_path / "nothing", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "repo"]


def test_triton_serves_a_written_repository(installation, engine, tmp_path):
    """A server that was not started by `mxcompile serve`, on a copied engine."""
    write_repository(engine, tmp_path / "repo", settings=Settings("", threads=1))
    http, grpc, metrics = free_ports(3)
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    with (tmp_path / "log").open("w") as log, TritonServer(installation, tmp_path / "repo", log=log, **ports) as server:
        server.wait_ready(LIMIT_S)
        status, values = Served(None, None, 0, http, grpc, metrics).post("generate", {"text_input": "a"})
        assert status == 200
        assert values["num_output_tokens"] >= 1
        assert server.stop() == 0


def test_a_model_that_cannot_start_says_why(installation, engine, tmp_path):
    folder = write_repository(engine, tmp_path / "repo", settings=Settings("", threads=1))
    (folder / "1" / "engine" / "rank0.onnx").write_bytes(b"damaged")
    http, grpc, metrics = free_ports(3)
    ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    with (
        (tmp_path / "log").open("w") as log,
        TritonServer(installation, tmp_path / "repo", log=log, **ports) as server,
        pytest.raises(EnvironmentProblem, match="ended while it was starting"),
    ):
        server.wait_ready(LIMIT_S)
    assert "rebuild the engine" in (tmp_path / "log").read_text()
