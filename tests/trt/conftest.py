"""Shared by the TensorRT tests: the plugin library that the plugin tests build, and engines that are built once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnx_ir as ir
import pytest
from engine_limits import LIMITS

from model_defs.config import ModelConfig
from mxcompile import tensorrt_building
from mxcompile.building import BuildSummary, build
from mxcompile.checkpoints import create_checkpoint
from plugins.build import BuildResult
from plugins.tensorrt_runtime import load_tensorrt

_SPEC = importlib.util.spec_from_file_location(
    "plugins_conftest", Path(__file__).parents[1] / "plugins" / "conftest.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_PLUGINS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_PLUGINS)
plugin_build = _PLUGINS.plugin_build
pytest_collection_modifyitems = _PLUGINS.pytest_collection_modifyitems


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Builds of one configuration and type in this process share a trace, which takes longer than the rest of a small build."""
    trace, known = tensorrt_building.graph, dict[tuple[str, str], ir.Model]()

    def graph(config: ModelConfig, dtype: str) -> ir.Model:
        key = (repr(config), dtype)
        if key not in known:
            known[key] = trace(config, dtype)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_building, "graph", graph)
        yield


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    return load_tensorrt("tensorrt-rtx")


@pytest.fixture(scope="session")
def plugins_at_hand(plugin_build: BuildResult, trt: ModuleType) -> Iterator[Path]:
    """Where builds and sessions look for the plugin library is where the tests' is."""
    if plugin_build.tensorrt is None:
        pytest.skip("no TensorRT headers (kernel-lens) were there to build with")
    folder = plugin_build.tensorrt.path.parent
    before = os.environ.get("MXCOMPILE_PLUGINS_DIR")
    os.environ["MXCOMPILE_PLUGINS_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MXCOMPILE_PLUGINS_DIR"]
    else:
        os.environ["MXCOMPILE_PLUGINS_DIR"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorrt") / "tiny"
    create_checkpoint("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def bf16_engine(tiny: Path, plugins_at_hand: Path) -> tuple[Path, BuildSummary]:
    """Weights inside, attention with a mask."""
    output = tiny.parent / "bf16"
    return output, build(tiny, output, target="tensorrt-rtx", **LIMITS)


@pytest.fixture(scope="session")
def stripped_engine(tiny: Path, plugins_at_hand: Path) -> tuple[Path, BuildSummary]:
    """fp16, weights outside, and a capacity that takes the attention plugin."""
    output = tiny.parent / "stripped"
    limits = LIMITS | {"max_seq_len": 65536, "prefill_chunk": 2048}
    return output, build(tiny, output, target="tensorrt-rtx", dtype="float16", strip_weights=True, **limits)
