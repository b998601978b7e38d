"""The plugin library inside TensorRT-RTX, without a GPU: registry, parser, shape inference, engine building."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from onnx_models import BF16, FP16, FP32, INT32, INT64, linear_attention, moe, softmax_attention

from plugins import catalog, tensorrt_runtime
from plugins.build import TENSORRT_LIBRARY, BuildResult
from plugins.errors import LibraryError, PluginsUsageError
from plugins.tensorrt_runtime import LoadedPlugins, check_versions, load_plugins, load_tensorrt
from plugins.toolchain import find_tensorrt_headers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    if importlib.util.find_spec("tensorrt_rtx") is None:  # importing it here would load its libraries too early
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    return load_tensorrt("tensorrt-rtx")


@pytest.fixture(scope="module")
def loaded(trt: ModuleType, plugin_build: BuildResult) -> LoadedPlugins:
    if plugin_build.tensorrt is None:
        pytest.skip("no TensorRT headers (kernel-lens) were there to build with")
    return load_plugins(trt, plugin_build.tensorrt.path.parent)


class Network:
    """One builder whose log is kept; TensorRT keeps the first logger of a process."""

    def __init__(self, trt: ModuleType) -> None:
        self.lines: list[str] = []
        lines = self.lines

        class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                lines.append(message)

        self.trt = trt
        self.logger = Logger()
        self.builder = trt.Builder(self.logger)

    def parse(self, model: bytes) -> Any:
        """The parsed network, or None with the reasons in `lines`."""
        self.lines.clear()
        network = self.builder.create_network(0)
        self.parser = self.trt.OnnxParser(network, self.logger)
        return network if self.parser.parse(model) else None

    def build(self, network: Any, largest: dict[str, int], config: Any = None) -> bytes | None:
        """An engine for dynamic dimensions from 1 to those of `largest` (by symbolic place: first, second)."""
        config = config or self.builder.create_builder_config()
        profile = self.builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            shape = tuple(tensor.shape)
            if -1 in shape:
                names = {"router_probs": "N", "past_state": "B"}.get(
                    tensor.name, "B-S" if "cache" in tensor.name else "BTT"
                )
                bounds = [tuple(1 if d < 0 else d for d in shape)]
                bounds.append(tuple(largest[names[axis]] if d < 0 else d for axis, d in enumerate(shape)))
                profile.set_shape(tensor.name, bounds[0], bounds[1], bounds[1])
        config.add_optimization_profile(profile)
        engine = self.builder.build_serialized_network(network, config)
        return None if engine is None else bytes(engine)

    def errors(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(scope="module")
def network(trt: ModuleType, loaded: LoadedPlugins) -> Iterator[Network]:
    return Network(trt)


def test_every_plugin_is_registered_once(trt: ModuleType, loaded: LoadedPlugins) -> None:
    again = load_plugins(trt, loaded.path.parent)
    assert again.path == loaded.path
    names = [c.name for c in trt.get_plugin_registry().all_creators]
    assert sorted(name for name in names if name in catalog.plugin_names()) == list(catalog.plugin_names())


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
@pytest.mark.parametrize("decay", [FP32, BF16])
def test_linear_attention_builds_with_dynamic_batch_and_length(network: Network, domain: str, decay: int) -> None:
    parsed = network.parse(linear_attention(domain, changes={"decay": (decay, ("B", "T", 4))}))
    assert parsed is not None, network.errors()
    output, state = parsed.get_output(0), parsed.get_output(1)
    assert tuple(output.shape) == (-1, -1, 512)
    assert tuple(state.shape) == (-1, 4, 128, 128)
    assert (output.dtype, state.dtype) == (network.trt.bfloat16, network.trt.float32)
    engine = network.build(parsed, {"B": 8, "T": 4096})
    assert engine is not None, network.errors()
    # The plugin is in the engine with its attributes and the node's name.
    for text in (b"LinearAttention", b"update_rule", b"the_LinearAttention"):
        assert text in engine
    # Scratch: 256 states of 64 KB and their decays for the segments; the widened decay where it is not fp32.
    scratch = max(int(size) for size in re.findall(r"Scratch Memory: (\d+) bytes", network.errors()))
    assert scratch == 256 * 65536 + 1024 + (0 if decay == FP32 else 8 * 4096 * 4 * 4)


def test_linear_attention_without_state_or_decay(network: Network) -> None:
    model = linear_attention(update_rule="linear", scale=None, dtype=FP16, head_dim=64, drop=["past_state", "decay"])
    parsed = network.parse(model)
    assert parsed is not None, network.errors()
    assert tuple(parsed.get_output(1).shape) == (-1, 4, 64, 64)
    assert network.build(parsed, {"B": 2, "T": 64}) is not None, network.errors()


def test_aliased_states_need_the_builder_to_allow_them(network: Network, loaded: LoadedPlugins) -> None:
    config = network.builder.create_builder_config()
    loaded.alias_states(network.trt, config)
    try:
        parsed = network.parse(linear_attention())
        assert network.build(parsed, {"B": 2, "T": 64}, config) is not None, network.errors()
        parsed = network.parse(linear_attention())
        assert network.build(parsed, {"B": 2, "T": 64}) is None
        assert "ALIASED_PLUGIN_IO" in network.errors()
    finally:
        loaded.alias_states(network.trt, network.builder.create_builder_config(), on=False)
    parsed = network.parse(linear_attention())
    assert network.build(parsed, {"B": 2, "T": 64}) is not None, network.errors()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (dict(update_rule="gated_delta"), "update_rule 'gated_delta' is not supported; only 'linear' and 'gated'"),
        (dict(update_rule="delta"), "update_rule 'delta' is not supported"),
        (dict(update_rule="none"), "unknown update_rule 'none'"),
        (dict(update_rule=None), "update_rule 'gated_delta' is not supported"),
        (dict(kv_num_heads=2), "kv_num_heads is 2 and q_num_heads 4; only equal numbers"),
        (dict(chunk_size=-1), "chunk_size is -1"),
        (dict(scale=float("inf")), "scale is not finite"),
        (dict(head_dim=96), "head_dim must be 64 or 128"),
        (dict(dtype=FP32), "query is fp32; give fp16 or bf16"),
        (dict(changes={"key": (FP16, ("B", "T", 512))}), "key is fp16 and query bf16"),
        (
            dict(changes={"past_state": (BF16, ("B", 4, 128, 128))}),
            "past_state is bf16; the recurrent state must be fp32",
        ),
        (dict(changes={"past_state": (FP32, ("B", 4, 64, 128))}), "dimension 2 of past_state is 64; 128 expected"),
        (dict(changes={"past_state": (FP32, ("B", 4, 16384))}), "past_state has 3 dimensions"),
        (
            dict(changes={"decay": (FP32, ("B", "T", 512))}),
            "dimension 2 of decay is 512; 4 expected (one decay per head)",
        ),
        (dict(changes={"decay": (FP16, ("B", "T", 4))}), "decay is fp16; give fp32 or the type of query"),
        (dict(changes={"value": (BF16, ("B", "T", 256))}), "value is 256 wide"),
        (dict(changes={"query": (BF16, ("B", 512))}), "query has 2 dimensions"),
        (dict(drop=["decay"]), "it has 4 inputs"),
    ],
)
def test_linear_attention_refuses(network: Network, options: dict[str, Any], wrong: str) -> None:
    assert network.parse(linear_attention(**options)) is None
    assert f"LinearAttention 'the_LinearAttention': {wrong}" in network.errors() or (
        "'the_LinearAttention'" in network.errors() and wrong in network.errors()
    ), network.errors()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("router", [FP16, FP32])
def test_moe_builds_with_dynamic_batch_and_length(network: Network, quantized: bool, router: int) -> None:
    parsed = network.parse(moe(quantized, changes={"router_probs": (router, ("N", 4))}))
    assert parsed is not None, network.errors()
    assert tuple(parsed.get_output(0).shape) == (-1, -1, 64)
    engine = network.build(parsed, {"B": 2, "T": 64, "N": 128})
    assert engine is not None, network.errors()
    assert b"normalize_routing_weights" in engine


def test_moe_may_hold_a_range_of_the_experts(network: Network) -> None:
    parsed = network.parse(moe(changes={"router_probs": (FP16, ("N", 16))}, first_local_expert=12))
    assert parsed is not None, network.errors()
    assert network.parse(moe(changes={"router_probs": (FP16, ("N", 16))}, first_local_expert=13)) is None
    assert "experts 13 to 16 are held here, but router_probs has 16" in network.errors()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (dict(k=5), "k is 5, more than the 4 experts"),
        (dict(k=0), "k is 0; give 1 to 8"),
        (dict(k=9), "k is 9; give 1 to 8"),
        (dict(activation_type="relu"), "activation_type 'relu' with swiglu_fusion 1 is not supported"),
        (dict(swiglu_fusion=2), "swiglu_fusion 2 is not supported"),
        (dict(activation_alpha=1.702), "activation_alpha 1.702"),
        (dict(activation_beta=1.0), "activation_beta 1"),
        (dict(swiglu_limit=7.0), "swiglu_limit 7"),
        (dict(use_sparse_mixer=1), "use_sparse_mixer is not supported"),
        (dict(first_local_expert=-1), "first_local_expert is -1"),
        (dict(bias=True), "input 3 (fc1_experts_bias) is not supported"),
        (dict(changes={"input": (BF16, ("B", "T", 64))}), "router_probs is fp16; give fp32 or the type of input"),
        (dict(changes={"fc1": (BF16, (4, 96, 64))}), "fc1_experts_weights is bf16; fp16 expected"),
        (dict(changes={"input": (FP32, ("B", "T", 64))}), "input is fp32; give fp16 or bf16"),
        (dict(changes={"fc1": (FP16, (4, 90, 64))}), "do not go with hidden size 64"),
        (dict(changes={"fc2": (FP16, (3, 64, 48))}), "do not go with hidden size 64"),
        (dict(changes={"fc1": (FP16, (96, 64))}), "fc1_experts_weights has 2 dimensions"),
        (
            dict(changes={"input": (FP16, (2, 3, 64)), "router_probs": (FP16, (5, 4))}),
            "input has 6 tokens and router_probs 5",
        ),
        (dict(quantized=True, expert_weight_bits=4), "expert_weight_bits is 4; only 8"),
        (dict(quantized=True, block_size=128), "block_size is 128"),
        (dict(quantized=True, changes={"fc1": (FP16, (4, 96, 64))}), "fc1_experts_weights is fp16; int8 expected"),
        (dict(quantized=True, changes={"fc1_scales": (FP32, (4, 48))}), "fc1_scales must be [4, 96]"),
        (dict(quantized=True, changes={"fc2_scales": (FP16, (4, 64))}), "give both in fp32 or in the type of input"),
    ],
)
def test_moe_refuses(network: Network, options: dict[str, Any], wrong: str) -> None:
    assert network.parse(moe(**options)) is None
    name = "QMoEInt8" if options.get("quantized") else "MoE"
    assert f"{name} 'the_{name}': " in network.errors()
    assert wrong in network.errors(), network.errors()


def test_widths_that_no_kernel_has_fail_while_building(network: Network) -> None:
    """fp16 rows must be multiples of 8 values; what the launcher would refuse, the build refuses with its text."""
    odd = {"input": (FP16, ("B", "T", 60)), "fc1": (FP16, (4, 96, 60)), "fc2": (FP16, (4, 60, 48))}
    parsed = network.parse(moe(changes=odd))
    assert parsed is None or network.build(parsed, {"B": 2, "T": 64, "N": 128}) is None
    assert "MoE 'the_MoE': " in network.errors()
    assert "hidden" in network.errors()


@pytest.mark.parametrize("lengths", [INT32, INT64])
def test_softmax_attention_builds_with_dynamic_lengths_and_capacity(network: Network, lengths: int) -> None:
    changes = dict.fromkeys(("past_lengths", "new_lengths"), (lengths, ("B",)))
    parsed = network.parse(softmax_attention(changes, scale=0.5))
    assert parsed is not None, network.errors()
    assert tuple(parsed.get_output(0).shape) == (-1, 8, -1, 128)
    engine = network.build(parsed, {"B": 4, "T": 16, "S": 8192})
    assert engine is not None, network.errors()
    assert b"the_SoftmaxAttention" in engine


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (dict(drop=["new_lengths"]), "it has 4 inputs"),
        (dict(changes={"query": (FP32, ("B", 8, "T", 128))}), "query is fp32; give fp16 or bf16"),
        (dict(changes={"key_cache": (FP16, ("B", 2, "S", 128))}), "key_cache is fp16 and query bf16"),
        (dict(changes={"new_lengths": (INT32, ("B",))}), "past_lengths is int64 and new_lengths int32"),
        (dict(changes={"query": (BF16, ("B", "T", 1024))}), "query has 3 dimensions; give [B, heads, T, head_dim]"),
        (dict(changes={"query": (BF16, ("B", 7, "T", 128))}), "7 heads are not a multiple of 2 key/value heads"),
        (dict(changes={"value_cache": (BF16, ("B", 2, "S", 64))}), "must both be [B, 2, capacity, 128]"),
        (
            dict(changes={"query": (BF16, (3, 8, "T", 128)), "past_lengths": (INT64, (2,))}),
            "past_lengths is for 2 sequences",
        ),
        (dict(scale=float("inf")), "scale is not finite"),
    ],
)
def test_softmax_attention_refuses(network: Network, options: dict[str, Any], wrong: str) -> None:
    assert network.parse(softmax_attention(**options)) is None
    assert "SoftmaxAttention 'the_SoftmaxAttention': " in network.errors()
    assert wrong in network.errors(), network.errors()


def test_parser_keeps_the_name_qmoe_for_itself(network: Network) -> None:
    """Why int8 experts are called QMoEInt8: when this fails the parser has learnt to pass QMoE on."""
    assert network.parse(moe(quantized=True, op="QMoE", activation_alpha=1.0, activation_beta=0.0)) is None
    assert "QMoEHelper" in network.errors() or "QMoE" in network.errors()


def test_serialization_and_run_time_errors(plugin_build: BuildResult, has_gpu: bool, tmp_path: Path) -> None:
    """A C++ program in TensorRT's place: fields survive, and a launch that fails names op and node."""
    headers = find_tensorrt_headers()
    if headers is None or plugin_build.tensorrt is None:
        pytest.skip("no TensorRT headers")
    if has_gpu:
        pytest.skip("the program passes host memory; it is for machines without a GPU")
    cuda = _cuda_include()
    program = tmp_path / "harness"
    source = Path(__file__).with_name("tensorrt_harness.cpp")
    includes = ["-isystem", str(headers[0]), "-isystem", str(cuda)]
    subprocess.run(["c++", "-std=c++17", *includes, str(source), "-o", str(program), "-ldl"], check=True)
    done = subprocess.run([program, plugin_build.tensorrt.path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    creators = {line.removeprefix("creator=") for line in lines if line.startswith("creator=")}
    assert creators == {f"{name}/1/" for name in catalog.plugin_names()}
    facts = dict(line.split("=", 1) for line in lines if not line.startswith("creator="))
    assert "update_rule:gated;scale:0.500000" in facts["LinearAttention.fields"]
    for name in ("LinearAttention", "MoE", "QMoEInt8", "SoftmaxAttention"):
        assert "node_name:layers.3;" in facts[f"{name}.fields"]
        assert facts[f"{name}.round_trip"] == "1"
        assert facts[f"{name}.shaped"] == "0"
        assert facts[f"{name}.enqueue"] == "-1"
        assert facts[f"{name}.wrong_rank"] == "-1"
        assert re.search(rf"{name} 'layers\.3': .*no usable GPU", done.stderr), done.stderr


def _cuda_include() -> Path:
    from plugins.toolchain import find_nvcc

    done = subprocess.run([find_nvcc(), "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"TOP=(\S+)", done.stdout + done.stderr)
    assert top is not None
    found = list(Path(top[1]).resolve().rglob("cuda_runtime_api.h"))
    return found[0].parent


@pytest.mark.parametrize(
    ("flavour", "runtime", "headers", "fits"),
    [
        ("tensorrt-rtx", "1.7.1.116", "10.14", True),
        ("tensorrt-rtx", "1.8.0.1", "1.8", True),
        ("tensorrt-rtx", "1.7.1.116", "8.6", False),
        ("tensorrt-rtx", "1.2.0.54", "10.14", False),
        ("tensorrt-rtx", "2.0.0.1", "10.14", False),
        ("tensorrt", "10.14.1.48", "10.3", True),
        ("tensorrt", "11.4.0.1", "10.14", False),
        ("tensorrt", "11.4.0.1", "11.2", True),
    ],
)
def test_header_and_runtime_versions(flavour: str, runtime: str, headers: str, fits: bool) -> None:
    if fits:
        check_versions(flavour, runtime, headers)
        return
    with pytest.raises(LibraryError, match="mxcompile plugins build") as raised:
        check_versions(flavour, runtime, headers)
    assert raised.value.exit_code == 3
    assert headers in str(raised.value)


def test_library_of_other_headers_is_not_loaded(
    trt: ModuleType, loaded: LoadedPlugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "__version__", "1.2.0.54")
    with pytest.raises(LibraryError, match=r"cannot be loaded into tensorrt-rtx 1\.2"):
        load_plugins(trt, loaded.path.parent)


def test_missing_and_foreign_libraries_are_named(trt: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="mxcompile plugins build"):
        load_plugins(trt, tmp_path)
    (tmp_path / TENSORRT_LIBRARY).write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="not a plugin library of this package"):
        load_plugins(trt, tmp_path)


def test_unknown_flavour_and_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginsUsageError, match="tensorrt-rtx, tensorrt"):
        load_tensorrt("trt")
    monkeypatch.setitem(tensorrt_runtime.MODULES, "tensorrt", "no_such_module")
    with pytest.raises(LibraryError, match=r"pip install 'tensorrt-cu13>=10\.16,<11'"):
        load_tensorrt("tensorrt")


def test_importing_tensorrt_first_is_an_error_and_not_a_crash(trt: ModuleType) -> None:
    """The parser would end the process on the first plugin node."""
    program = "import tensorrt_rtx\nfrom plugins.tensorrt_runtime import load_tensorrt\nload_tensorrt()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "import it through load_tensorrt() only" in done.stderr
