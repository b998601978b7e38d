"""Each pass on its own: what it changes, what it refuses, what it leaves alone."""

from __future__ import annotations

from types import SimpleNamespace

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowered_graph import bind, canonical, random_model, small_config, traced

from engines.tensorrt.gpus import GPUS, find_gpu
from engines.tensorrt.lengths import MAX_MASK_BYTES, attention_for, capacity_for
from engines.tensorrt.lowering import FillAbsentInputs, MaskAttention, NarrowLightning, PluginAttention, StaticCache
from engines.tensorrt.profiles import DECODE, PREFILL, Shapes, add_profiles
from engines.tensorrt.stream import make_writer


@pytest.fixture
def graph() -> ir.Model:
    config = small_config()
    return canonical(config, "bfloat16", random_model(config, "bfloat16"))


def nodes(model: ir.Model, op: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op]


def test_static_cache_fixes_the_capacity_everywhere_once(graph: ir.Model) -> None:
    assert StaticCache(64)(graph).modified
    values = [*graph.graph.inputs, *graph.graph.outputs]
    dims = {value.name: list(value.shape) for value in values if (value.name or "").endswith(".key")}
    assert dims.keys() == {"past_key_values.7.key", "present.7.key"}
    assert {dim[2] for dim in dims.values()} == {64}
    assert not StaticCache(64)(graph).modified


def test_lightning_attention_becomes_narrow_and_keeps_a_wide_state(graph: ir.Model) -> None:
    assert NarrowLightning()(graph).modified
    for node in nodes(graph, "LinearAttention"):
        assert [node.inputs[i].dtype for i in range(5)] == [ir.DataType.BFLOAT16] * 3 + [ir.DataType.FLOAT] * 2
        assert [value.dtype for value in node.outputs] == [ir.DataType.BFLOAT16, ir.DataType.FLOAT]
    assert not NarrowLightning()(graph).modified


def test_an_fp32_graph_is_not_narrowed() -> None:
    config = small_config()
    model = bind(traced(config, "float32").clone(), random_model(config, "float32"))
    assert not NarrowLightning()(model).modified


def test_the_mask_replaces_lengths_and_causality(graph: ir.Model) -> None:
    StaticCache(64)(graph)
    assert MaskAttention(64)(graph).modified
    (node,) = nodes(graph, "Attention")
    assert len(node.inputs) == 4
    assert "is_causal" not in node.attributes
    assert [node.inputs[i].producer().op_type for i in (1, 2, 3)] == ["Where", "Where", "LessOrEqual"]


def test_the_plugin_gets_cache_and_lengths(graph: ir.Model) -> None:
    assert PluginAttention()(graph).modified
    (node,) = nodes(graph, "SoftmaxAttention")
    assert [value.name for value in node.inputs][3:] == ["past_lengths", "new_lengths"]
    assert [value.producer().op_type for value in node.inputs[1:3]] == ["TensorScatter"] * 2
    assert not nodes(graph, "Attention")


def test_a_scale_is_kept(graph: ir.Model) -> None:
    (node,) = nodes(graph, "Attention")
    node.attributes["scale"] = ir.AttrFloat32("scale", 0.25)
    PluginAttention()(graph)
    assert nodes(graph, "SoftmaxAttention")[0].attributes["scale"].as_float() == 0.25


@pytest.mark.parametrize(("name", "value"), [("softcap", 30.0), ("left_window_size", 128.0), ("unheard_of", 1.0)])
def test_attention_that_the_plugin_cannot_do_is_refused(graph: ir.Model, name: str, value: float) -> None:
    (node,) = nodes(graph, "Attention")
    node.attributes[name] = ir.AttrFloat32(name, value)
    with pytest.raises(ValueError, match=name):
        PluginAttention()(graph)


@pytest.mark.parametrize("lowering", [MaskAttention(64), PluginAttention()])
def test_attention_without_lengths_is_refused(graph: ir.Model, lowering: ir.passes.InPlacePass) -> None:
    (node,) = nodes(graph, "Attention")
    node.replace_input_with(6, None)
    with pytest.raises(ValueError, match="not canonical"):
        lowering(graph)


def test_absent_inputs_become_tensors_without_elements(graph: ir.Model) -> None:
    assert FillAbsentInputs()(graph).modified
    biases = {node.inputs[3] for node in nodes(graph, "MoE")}
    assert len(biases) == 1
    (bias,) = biases
    assert bias.producer().attributes["value"].as_tensor().numpy().shape == (0,)
    assert not FillAbsentInputs()(graph).modified


@given(st.integers(2, 10_000_000))
def test_a_cache_has_room_for_an_idle_row_at_its_limit(max_seq_len: int) -> None:
    capacity = capacity_for(max_seq_len)
    assert max_seq_len < capacity <= max_seq_len + 64
    assert capacity % 64 == 0


@given(st.integers(1, 256), st.integers(1, 8192), st.integers(64, 1_000_000))
def test_masks_are_bounded(batch: int, chunk: int, capacity: int) -> None:
    if attention_for(batch, chunk, capacity) == "mask":
        assert batch * chunk * capacity <= MAX_MASK_BYTES
    else:
        assert batch * chunk * capacity > MAX_MASK_BYTES


def test_profiles_cover_decode_and_prefill() -> None:
    set_shapes: list[dict[str, tuple]] = []

    class Profile(dict):
        def set_shape(self, name: str, *dims: tuple[int, ...]) -> None:
            self[name] = dims

    builder = SimpleNamespace(create_optimization_profile=Profile)
    config = SimpleNamespace(add_optimization_profile=set_shapes.append)
    inputs = [
        SimpleNamespace(name="input_ids", shape=(-1, -1)),
        SimpleNamespace(name="logit_positions", shape=(-1, -1)),
        SimpleNamespace(name="past_lengths", shape=(-1,)),
        SimpleNamespace(name="past_key_values.7.key", shape=(-1, 2, 64, 128)),
        SimpleNamespace(name="embed_tokens.weight", shape=(64, 32)),
    ]
    network = SimpleNamespace(num_inputs=len(inputs), get_input=inputs.__getitem__)
    add_profiles(builder, config, network, Shapes(max_batch_size=4, prefill_chunk=32, vocab_size=64))
    assert set_shapes[DECODE]["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert set_shapes[PREFILL]["input_ids"] == ((1, 1), (1, 32), (4, 32))
    assert set_shapes[PREFILL]["logit_positions"][2] == (4, 32)
    assert set_shapes[PREFILL]["past_key_values.7.key"] == ((1, 2, 64, 128), (1, 2, 64, 128), (4, 2, 64, 128))
    assert "embed_tokens.weight" not in set_shapes[PREFILL]


def test_logits_of_all_positions_are_given_up_where_they_would_be_large() -> None:
    assert Shapes(8, 2048, 200_064).max_positions == 1
    assert Shapes(1, 256, 512).max_positions == 256


def test_every_gpu_has_a_target_and_a_plugin_architecture() -> None:
    from plugins.catalog import architecture_for

    for gpu in GPUS.values():
        assert gpu.targets
        assert architecture_for(gpu.capability) is not None
    assert find_gpu(None, "tensorrt").name == "h20"
    assert find_gpu("rtx-5090", "tensorrt-rtx").capability == 120


def test_a_disk_that_fails_under_a_plan_is_not_lost() -> None:
    """TensorRT itself calls such a build successful."""

    class Base:
        def __init__(self) -> None:
            """As TensorRT's, which must be called."""

    def full(piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    writer = make_writer(SimpleNamespace(IStreamWriter=Base), full)
    assert writer.write(b"plan") == 0
    assert isinstance(writer.error, OSError)
    pieces: list[bytes] = []
    writer = make_writer(SimpleNamespace(IStreamWriter=Base), pieces.append)
    assert (writer.write(b"pl"), writer.write(b"an")) == (2, 2)
    assert (writer.error, writer.size, pieces) == (None, 4, [b"pl", b"an"])
