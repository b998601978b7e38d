"""A small engine, and the real server on it: `mxcompile serve` as users start it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import pytest
from served import LIMIT_S, Served, launch, triton_venv


@pytest.fixture(scope="session")
def installation():
    """The real Triton."""
    from mxcompile.serving.triton.environment import find

    found = find(triton_venv())
    if found is None:
        pytest.skip(f"Triton Inference Server is not installed in {triton_venv()} (make setup does that)")
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of preset tiny; do not write into it."""
    from mxcompile.checkpoints import create_checkpoint

    folder = tmp_path_factory.mktemp("serving") / "checkpoint"
    create_checkpoint("tiny", folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def engine(checkpoint, tmp_path_factory) -> Path:
    """Its fp32 engine for 8 sequences of 320 tokens; do not write into it."""
    from mxcompile.building import build

    folder = tmp_path_factory.mktemp("serving") / "engine"
    build(checkpoint, folder, max_batch_size=8, max_seq_len=320, prefill_chunk=32, threads=2)
    return folder


@pytest.fixture(scope="session")
def loaded(engine):
    """The engine in this process: what the server must equal."""
    from mxcompile.loading import load

    return load(engine, threads=1)


@pytest.fixture(scope="session")
def start_server(installation, engine, tmp_path_factory):
    """Starts `mxcompile serve`: start_server("--option", value, ...) -> Served, stopped at the end."""
    running: list[Served] = []

    def start(*options: object) -> Served:
        running.append(launch(engine, tmp_path_factory.mktemp("log") / "server.log", triton_venv(), *options))
        return running[-1]

    yield start
    assert [server.stop() for server in running] == [server.expected for server in running]


@pytest.fixture(scope="session")
def server(start_server) -> Served:
    """One server that most tests share."""
    return start_server()


@pytest.fixture(scope="session")
def vl_engine(tmp_path_factory) -> Path:
    """An fp32 engine of two layers of preset tiny-vl, with its vision half, for 8 sequences of 640 tokens; do not write into it."""
    from model_defs.presets import preset
    from mxcompile.building import build
    from mxcompile.checkpoints import create_checkpoint

    folder = tmp_path_factory.mktemp("serving-vl")
    model = dataclasses.replace(preset("tiny-vl"), layer_kinds=("lightning", "softmax"), slope_layers=2)
    create_checkpoint(model, folder / "checkpoint", seed=1)
    build(folder / "checkpoint", folder / "engine", max_batch_size=8, max_seq_len=640, prefill_chunk=32, threads=2)
    return folder / "engine"


@pytest.fixture(scope="session")
def vl_loaded(vl_engine):
    """The engine in this process."""
    from mxcompile.loading import load

    return load(vl_engine, threads=1)


@pytest.fixture(scope="session")
def vl_server(installation, vl_engine, tmp_path_factory):
    """One server on it that all tests of images share."""
    server = launch(vl_engine, tmp_path_factory.mktemp("log") / "server.log", triton_venv())
    yield server
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0, server.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert not alive, "also the process that decodes images"
