"""TensorRT-RTX engines built without a GPU, through the public doors; what loading refuses."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from engine_limits import LIMITS

from engines import load
from engines.config import EngineConfig
from engines.directory import read_config
from engines.errors import EngineError
from engines.tensorrt.build import check_supported, load_runtime
from engines.tensorrt.device import CudaDevice, compute_capability
from engines.tensorrt.gpus import GPUS, check_at_hand
from engines.tensorrt.messages import make_logger, started
from engines.tensorrt.runtime import check_architectures, check_gpu, check_version
from engines.weights import map_weights
from export.errors import ExportError
from mxcompile.building import BuildSummary, build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError
from mxcompile.inspection import inspect

Engine = tuple[Path, BuildSummary]
no_gpu = pytest.mark.skipif(isinstance(compute_capability(), int), reason="this machine has a GPU")


def test_every_layer_has_its_plugins(bf16_engine: Engine, stripped_engine: Engine) -> None:
    found = inspect(bf16_engine[0])
    assert found["plugins"] == {"LinearAttention": 7, "MoE": 8}
    assert found["compiled_for"]["attention"] == "mask"
    assert found["operators"]["kv_cache_update"] == 2
    assert {"bfloat16", "float32"} <= set(found["precision"])
    found = inspect(stripped_engine[0])
    assert found["plugins"] == {"LinearAttention": 7, "MoE": 8, "SoftmaxAttention": 1}
    assert found["compiled_for"]["attention"] == "plugin"
    assert {"float16", "float32"} <= set(found["precision"])


@pytest.mark.slow
def test_small_builds_too(plugins_at_hand: Path, tmp_path: Path) -> None:
    """Text-01's proportions: heads and experts that `tiny` has too few of to meet every kernel's limits."""
    create_checkpoint("small", tmp_path / "small")
    build(tmp_path / "small", tmp_path / "e", target="tensorrt-rtx", strip_weights=True, max_batch_size=4)
    found = inspect(tmp_path / "e")
    assert found["plugins"] == {"LinearAttention": 7, "MoE": 8}
    assert found["memory"][0]["weights"] >= 2 * found["parameters"]["total"]


def test_taps_are_outputs_of_the_plan(tiny: Path, plugins_at_hand: Path, tmp_path: Path, bf16_engine: Engine) -> None:
    """In the types they have inside; off unless asked for."""
    build(tiny, tmp_path / "e", target="tensorrt-rtx", layers=2, taps=True, strip_weights=True, **LIMITS)
    config = read_config(tmp_path / "e")
    outputs = {port.name: (port.dtype, port.dims) for port in config.outputs}
    assert config.taps == ["taps.0.hidden", "taps.0.router_logits", "taps.1.hidden", "taps.1.router_logits"]
    assert outputs["taps.1.hidden"] == ("bfloat16", ["batch", "tokens", 128])
    assert outputs["taps.1.router_logits"] == ("float32", ["batch", "tokens", 8])
    assert read_config(bf16_engine[0]).taps == []


def test_the_parser_dropped_nothing(bf16_engine: Engine, stripped_engine: Engine) -> None:
    """An input that it does not understand gives a warning and no error."""
    for folder, _ in (bf16_engine, stripped_engine):
        warnings = read_config(folder).options["warnings"]
        assert not [text for text in warnings if "nused" in text or "gnor" in text]


def test_states_are_fp32_and_caches_16_bits(bf16_engine: Engine) -> None:
    types = {spec.role: spec.dtype for spec in read_config(bf16_engine[0]).states}
    assert types == {"recurrent_state": "float32", "key": "bfloat16", "value": "bfloat16"}


def test_stripped_weights_are_all_listed_and_read(tiny: Path, stripped_engine: Engine, bf16_engine: Engine) -> None:
    folder, _ = stripped_engine
    config = read_config(folder)
    weights = map_weights(folder, config, "rank0.weights.json")
    count = sum(array.size for array in weights.values())
    assert count >= inspect(tiny)["parameters"]["total"]
    assert weights["layers.0.block_sparse_moe.fc1.weight"].dtype == np.float16
    assert not {port.name for port in config.inputs} & set(weights)
    sizes = [(path / "rank0.engine").stat().st_size for path in (folder, bf16_engine[0])]
    assert sizes[0] < sizes[1] - 8_000_000  # 4.5 million parameters of 2 bytes


def test_an_unchanged_build_is_skipped_and_a_changed_one_is_not(tiny: Path, bf16_engine: Engine) -> None:
    folder, first = bf16_engine
    before = (folder / "rank0.engine").stat().st_mtime_ns
    again = build(tiny, folder, target="tensorrt-rtx", **LIMITS)
    assert (first.skipped, again.skipped) == (False, True)
    assert (folder / "rank0.engine").stat().st_mtime_ns == before
    assert again.sizes == first.sizes
    with pytest.raises(EngineError, match="--force"):
        build(tiny, folder, target="tensorrt-rtx", **(LIMITS | {"max_seq_len": 95}))


def test_a_damaged_engine_is_not_taken_for_unchanged(tiny: Path, bf16_engine: Engine, tmp_path: Path) -> None:
    copy = _damaged(bf16_engine[0], tmp_path)
    with pytest.raises(EngineError, match="--force"):
        build(tiny, copy, target="tensorrt-rtx", **LIMITS)


def test_memory_is_told_by_profile(bf16_engine: Engine, stripped_engine: Engine) -> None:
    """2 rows: 7 layers of 4 heads with 64 x 64 fp32, and a key and a value of 2 heads with 64 bf16 channels at 128 positions."""
    (inside,), (outside,) = inspect(bf16_engine[0])["memory"], inspect(stripped_engine[0])["memory"]
    assert inside["recurrent states"] == 2 * 7 * 4 * 64 * 64 * 4
    assert inside["key/value cache"] == 2 * 2 * 2 * 128 * 64 * 2
    assert inside["inputs and outputs"] == 2 * (16 + 1 + 1 + 16) * 8 + 2 * 16 * 512 * 4
    parameters = inspect(bf16_engine[0])["parameters"]["total"]
    assert (inside["weights"], outside["weights in the plan"]) == (0, pytest.approx(0, abs=2**20))
    assert inside["weights in the plan"] == pytest.approx(2 * parameters, rel=0.1)
    assert outside["weights"] >= 2 * parameters
    for memory in (inside, outside):
        assert set(memory["activations"]) == {"decode", "prefill"}
        assert memory["total"] > max(memory["activations"].values()) * 2 > 0
    # 128 times the tokens of a prefill chunk, beside scratch of a fixed size
    assert outside["activations"]["prefill"] > 2 * inside["activations"]["prefill"]


def test_memory_is_printed(bf16_engine: Engine) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mxcompile", "inspect", bf16_engine[0]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "activations, decode" in done.stdout
    assert "activations, prefill" in done.stdout


def test_peak_memory_is_told(bf16_engine: Engine) -> None:
    assert bf16_engine[1].peak_memory > 2**26


def test_a_killed_build_leaves_nothing_that_loads(tiny: Path, plugins_at_hand: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mxcompile", "build", tiny, "-o", tmp_path / "e", "--target", "tensorrt-rtx", "-v"]
    process = subprocess.Popen([*command, "--layers", "1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trace:"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "e").exists()
    for left in tmp_path.iterdir():
        with pytest.raises(EngineError, match=r"no config\.json"):
            load(left)


@no_gpu
def test_running_without_a_gpu_takes_one_line(bf16_engine: Engine) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mxcompile", "run", bf16_engine[0], "--tokens", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: this engine needs an NVIDIA GPU of compute capability 8.9")
    assert done.stderr.count("\n") == 1


def test_a_corrupt_plan_is_refused(bf16_engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"rank0\.engine: content differs"):
        load(_damaged(bf16_engine[0], tmp_path))


def test_a_corrupt_list_of_layers_is_refused(bf16_engine: Engine, tmp_path: Path) -> None:
    copy = shutil.copytree(bf16_engine[0], tmp_path / "copy")
    (copy / "rank0.layers.json").write_text("[1]")
    with pytest.raises(EngineError, match=r"rank0\.layers\.json"):
        inspect(copy)


def _damaged(engine: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(engine, tmp_path / "copy")
    data = bytearray((copy / "rank0.engine").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "rank0.engine").write_bytes(data)
    return copy


@pytest.fixture
def config(bf16_engine: Engine) -> EngineConfig:
    return read_config(bf16_engine[0])


@pytest.mark.parametrize(
    ("found", "words"),
    [(90, r"8\.9 \(built for rtx-4090\); here is one of 9\.0: build"), ("no NVIDIA GPU", "here is no")],
)
def test_another_gpu_is_refused(config: EngineConfig, found: int | str, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        check_gpu(config, found)
    assert caught.value.exit_code == 3
    check_gpu(config, 89)


def test_another_tensorrt_is_refused(config: EngineConfig) -> None:
    check_version(config, config.versions["tensorrt-rtx"])
    other = dataclasses.replace(config, versions={"tensorrt-rtx": "1.6.0"})
    with pytest.raises(EngineError, match=r"built with tensorrt-rtx 1\.6\.0, here is 1\.7\.1") as caught:
        check_version(other, "1.7.1")
    assert caught.value.exit_code == 3


def test_a_plugin_library_for_another_gpu_is_refused(config: EngineConfig) -> None:
    with pytest.raises(EngineError, match="mxcompile plugins build --arch 89") as caught:
        check_architectures(config, ("90a",), lambda capability: False)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_missing_or_wrong_plugin_library_is_refused(trt: object, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "libmxcompile_trt.so").write_bytes(content)
    with pytest.raises(EngineError, match="plugin") as caught:
        load_runtime("tensorrt-rtx", tmp_path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("version", "ranks", "words"), [("10.14.1", 1, r"10\.15 or later"), ("10.15.2", 2, r"several ranks: 10\.16")]
)
def test_a_tensorrt_that_lacks_a_layer_is_refused(version: str, ranks: int, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        check_supported("tensorrt", version, ranks)
    assert caught.value.exit_code == 3
    check_supported("tensorrt", "11.1.0.20", ranks)
    check_supported("tensorrt-rtx", "1.7.1.116", ranks)


@no_gpu
def test_tensorrt_proper_without_its_gpu_takes_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"compiles on the GPU that the engine is for \(h20, .* 9\.0\); here is no NVIDIA"
    ) as caught:
        build(tiny, tmp_path / "e", target="tensorrt")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_only_tensorrt_proper_needs_the_gpu_to_build() -> None:
    check_at_hand(GPUS["h200"], "tensorrt", 90)
    check_at_hand(GPUS["rtx-4090"], "tensorrt-rtx", "no NVIDIA driver")
    with pytest.raises(EngineError, match=r"\(h20, .* 9\.0\); here is one of 8\.0: .*--gpu") as caught:
        check_at_hand(GPUS["h20"], "tensorrt", 80)
    assert caught.value.exit_code == 3


def test_a_tensorrt_that_does_not_start_says_so(trt: ModuleType) -> None:
    def nothing(logger: object) -> None:
        """As the Python module does where TensorRT gave no builder."""
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(EngineError, match=r"failed starting its builder: .*NVIDIA driver") as caught:
        started(nothing, "builder", make_logger(trt))
    assert caught.value.exit_code == 3


class FullGpu:
    """As much of cuda.bindings.runtime as shows what an allocation says on a full GPU."""

    class cudaError_t:
        cudaSuccess = 0

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 2**30, 8 * 2**30


def test_too_little_gpu_memory_is_told_in_numbers() -> None:
    device = CudaDevice.__new__(CudaDevice)
    device._cuda = FullGpu()
    with pytest.raises(EngineError, match=r"4\.00 GiB more are needed, 1\.00 GiB are free") as caught:
        device.allocate(4 * 2**30)
    assert caught.value.exit_code == 3


@no_gpu
def test_a_device_without_a_driver_is_an_environment_error() -> None:
    with pytest.raises(EngineError) as caught:
        CudaDevice()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tensorrt-rtx", "gpu": "h200"}, "does not build for h200"),
        ({"target": "tensorrt-rtx", "gpu": "voodoo"}, "unknown GPU 'voodoo'"),
        ({"target": "tensorrt-rtx", "dtype": "float32"}, "--dtype bfloat16"),
        ({"target": "tensorrt-rtx", "tp_size": 3}, "4 attention heads do not divide by it"),
        ({"target": "onnxruntime", "strip_weights": True}, "TensorRT targets"),
    ],
)
def test_a_request_that_cannot_be_honoured(tiny: Path, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises((MxcompileError, EngineError, ExportError), match=words) as caught:
        build(tiny, tmp_path / "e", **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_the_engine_equals_pytorch_on_the_gpu(tiny: Path, plugins_at_hand: Path, tmp_path: Path) -> None:
    """The whole of `mxcompile validate`, on the first GPU that TensorRT-RTX builds for."""
    capability = compute_capability()
    fitting = [gpu for gpu in GPUS.values() if gpu.capability == capability and "tensorrt-rtx" in gpu.targets]
    if not fitting:
        pytest.skip(f"TensorRT-RTX builds for no GPU of compute capability {capability}")
    build(tiny, tmp_path / "e", target="tensorrt-rtx", gpu=fitting[0].name, taps=True, **LIMITS)
    session = load(tmp_path / "e")
    sizes = [session._engine.get_device_memory_size_for_profile_v2(profile) for profile in range(2)]
    told = inspect(tmp_path / "e")["memory"][0]["activations"]
    assert [told["decode"], told["prefill"]] == sizes  # what the builder says is what the engine takes
    del session
    command = [sys.executable, "-m", "mxcompile", "validate", tmp_path / "e", "--against", tiny, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
