"""What a build writes, where weights lie, and what loading refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import small_graph
from small_engine import SmallEngine, build_small

from engines import load, placing
from engines.config import Checkpoint
from engines.directory import EngineDirWriter, read_config
from engines.errors import EngineError
from engines.onnxruntime.build import BuildRequest, build

REQUEST = BuildRequest(model={}, max_batch_size=2, max_seq_len=64)


def weights_of(engine: Path) -> dict:
    return json.loads((engine / "rank0.weights.json").read_text())


def test_plain_weights_stay_in_the_checkpoint_and_derived_ones_are_written(small_engine: SmallEngine) -> None:
    listed = weights_of(small_engine.path)
    roots = [file["root"] for file in listed["files"]]
    data = {"checkpoint": small_engine.checkpoint, "engine": small_engine.path}
    found = {}
    for tensor in listed["tensors"]:
        file = listed["files"][tensor["file"]]
        raw = (data[file["root"]] / file["name"]).read_bytes()[tensor["offset"] :][: tensor["nbytes"]]
        found[tensor["name"]] = np.frombuffer(raw, tensor["dtype"]).reshape(tensor["shape"])
        derived = ".fc" in tensor["name"]
        assert roots[tensor["file"]] == ("engine" if derived else "checkpoint")
        if derived:
            assert tensor["offset"] % 64 == 0
            layer = int(tensor["name"][1])
            if tensor["name"].endswith("fc1"):
                assert np.array_equal(found[tensor["name"]], small_graph.interleaved(small_engine.weights, layer))
        else:
            assert np.array_equal(found[tensor["name"]], small_engine.weights[tensor["name"]])
    assert found.keys() == small_graph.initializer_shapes().keys()


def test_the_graph_file_is_valid_and_holds_no_weights(small_engine: SmallEngine) -> None:
    graph = small_engine.path / "rank0.onnx"
    onnx.checker.check_model(str(graph))
    assert graph.stat().st_size < 40_000
    operators = {(node.domain, node.op_type) for node in onnx.load(str(graph), load_external_data=False).graph.node}
    assert ("com.microsoft", "GroupQueryAttention") in operators
    assert ("com.microsoft", "LinearAttention") in operators
    assert not operators & {("", "Attention"), ("", "TensorScatter"), ("", "LinearAttention"), ("", "MatMul")}


def test_the_prefill_graph_refers_to_the_same_bytes(small_engine: SmallEngine) -> None:
    onnx.checker.check_model(str(small_engine.path / "rank0.prefill.onnx"))
    graph = onnx.load(str(small_engine.path / "rank0.prefill.onnx"), load_external_data=False).graph
    places = {t["name"]: t for t in weights_of(small_engine.path)["tensors"]}
    parts = [t for t in graph.initializer if "@" in t.name]
    assert len(parts) == 2 * small_graph.E * len(small_graph.KINDS)
    for tensor in parts:
        name, index = tensor.name.split("@")
        external = {entry.key: entry.value for entry in tensor.external_data}
        size = places[name]["nbytes"] // small_graph.E
        assert int(external["offset"]) == places[name]["offset"] + int(index) * size
        assert int(external["length"]) == size


def test_the_configuration_tells_the_contract(small_engine: SmallEngine) -> None:
    config = read_config(small_engine.path)
    assert [port.name for port in config.inputs[:4]] == ["input_ids", "new_lengths", "past_lengths", "logit_positions"]
    assert config.vocab_size == small_graph.N
    assert [(s.layer, s.role, s.dims) for s in config.states] == [
        (0, "recurrent_state", ["batch", 4, 16, 16]),
        (1, "key", ["batch", 2, "capacity", 16]),
        (1, "value", ["batch", 2, "capacity", 16]),
        (2, "recurrent_state", ["batch", 4, 16, 16]),
    ]
    assert config.num_layers == 3
    assert config.model == {"kind": "small"}
    assert set(config.taps) == set(small_graph.TAPS)


def test_an_engine_without_a_checkpoint_holds_all_its_weights(tmp_path: Path) -> None:
    model = small_graph.model(small_graph.random_weights())
    with EngineDirWriter(tmp_path / "engine") as writer:
        writer.commit(build(model, writer, REQUEST))
    assert [file["root"] for file in weights_of(tmp_path / "engine")["files"]] == ["engine"]
    session = load(tmp_path / "engine")
    assert session.prefill([[1, 2, 3]], session.new_state(1)).shape == (1, small_graph.N)


def test_progress_covers_the_derived_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    model = small_graph.model(small_graph.random_weights(), tmp_path / "checkpoint")
    request = BuildRequest(
        model={}, max_batch_size=1, max_seq_len=8, checkpoint=Checkpoint(str(tmp_path / "checkpoint"), "")
    )
    with EngineDirWriter(tmp_path / "engine") as writer:
        build(model, writer, request, lambda *event: seen.append(event))
    binding = [event for event in seen if event[0] == "bind weights"]
    assert len(binding) == 6
    assert binding[-1][1] >= binding[-1][2] > 0


def test_a_weight_that_the_runtime_may_fold_is_written_out(tmp_path: Path) -> None:
    model = small_graph.model(small_graph.random_weights(), tmp_path / "checkpoint")
    graph = model.graph
    norm = graph.initializers["norm"]
    user = next(iter(norm.uses())).node
    copied = ir.node("Abs", [norm])
    graph.insert_before(user, copied)
    user.replace_input_with(1, copied.outputs[0])
    request = BuildRequest(
        model={}, max_batch_size=1, max_seq_len=8, checkpoint=Checkpoint(str(tmp_path / "checkpoint"), "")
    )
    with EngineDirWriter(tmp_path / "engine") as writer:
        writer.commit(build(model, writer, request))
    listed = weights_of(tmp_path / "engine")
    place = next(t for t in listed["tensors"] if t["name"] == "norm")
    assert listed["files"][place["file"]]["root"] == "engine"
    session = load(tmp_path / "engine")
    assert np.isfinite(session.prefill([[1, 2]], session.new_state(1))).all()


@pytest.fixture
def engine(tmp_path: Path) -> SmallEngine:
    return build_small(tmp_path)


def test_a_changed_checkpoint_is_refused(engine: SmallEngine) -> None:
    file = engine.checkpoint / "weights.dat"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(EngineError, match=r"weights\.dat: content differs"):
        load(engine.path)
    file.write_bytes(data[:-4])
    with pytest.raises(EngineError, match=r"weights\.dat: \d+ bytes, the engine expects"):
        load(engine.path)


def test_a_moved_checkpoint_is_named_and_can_be_given(engine: SmallEngine) -> None:
    moved = engine.checkpoint.with_name("elsewhere")
    shutil.move(engine.checkpoint, moved)
    with pytest.raises(EngineError, match=r"weights\.dat.*say where the checkpoint is now"):
        load(engine.path)
    session = load(engine.path, checkpoint=moved)
    assert np.isfinite(session.prefill([[1, 2]], session.new_state(1))).all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw["tensors"][0].update(offset=10**9), "lies outside its file"),
        (lambda raw: raw["tensors"][0].update(offset=-4), "lies outside its file"),
        (lambda raw: raw["tensors"][0].update(shape=[10**6, 10**6]), "its shape needs"),
        (lambda raw: raw["tensors"][0].update(dtype="object"), "unknown type"),
        (lambda raw: raw["tensors"][0].update(file=7), "bytes"),
        (lambda raw: raw["tensors"].append(raw["tensors"][0]), "listed twice"),
        (lambda raw: raw["files"][0].update(name="../../secret"), "not a name inside"),
        (lambda raw: raw["files"][0].update(root="moon"), "unknown place"),
        (lambda raw: raw["parts"].update({"l0.fc1": 5}), "does not have 5 parts"),
        (lambda raw: raw["parts"].update(nothing=1), "does not have 1 parts"),
        (lambda raw: raw.pop("files"), "not a list of weights"),
    ],
)
def test_a_forged_list_of_weights_is_refused(engine: SmallEngine, edit, message: str) -> None:
    """Even when the digests were forged along with it."""
    from engines.digest import sampled, sha256

    file = engine.path / "rank0.weights.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    config = json.loads((engine.path / "config.json").read_text())
    config["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256(file), "sampled": sampled(file)}
    (engine.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=message):
        load(engine.path)


def test_tampering_with_the_engine_is_refused(engine: SmallEngine) -> None:
    file = engine.path / "rank0.weights.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(EngineError, match=r"rank0\.weights\.bin: content differs"):
        load(engine.path)


def test_an_engine_of_another_target_is_refused(engine: SmallEngine) -> None:
    file = engine.path / "config.json"
    file.write_text(file.read_text().replace('"onnxruntime"', '"abacus"', 1))
    with pytest.raises(EngineError, match="abacus"):
        load(engine.path)


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(EngineError, match=r"the disk has 0\.00 GB") as caught:
        build_small(tmp_path)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1"),
        ({"taps": ["nowhere"]}, "no value 'nowhere' to tap"),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build_small(tmp_path, **change)
    assert not (tmp_path / "engine").exists()


def test_weights_of_a_type_without_kernels_are_refused(tmp_path: Path) -> None:
    model = small_graph.model(small_graph.random_weights())
    value = model.graph.initializers["lm_head"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy().astype("float64"))
    with (
        pytest.raises(EngineError, match=r"lm_head is .*build with float32"),
        EngineDirWriter(tmp_path / "engine") as writer,
    ):
        build(model, writer, REQUEST)


def test_unbound_weights_are_refused(tmp_path: Path) -> None:
    model = small_graph.model(small_graph.random_weights())
    model.graph.initializers["norm"].const_value = None
    with pytest.raises(EngineError, match="norm has no bytes"), EngineDirWriter(tmp_path / "engine") as writer:
        build(model, writer, REQUEST)
