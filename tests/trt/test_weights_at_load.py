"""Weights that are put together of a checkpoint's bytes when an engine is loaded: the same bytes as those of a file that holds them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from host_device import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.config import Checkpoint as CheckpointReference
from engines.directory import EngineFiles
from engines.errors import EngineError
from engines.pieces import Piece, Strand, blocks, check_pieces
from engines.placing import place_weights
from engines.tensorrt.loading import load_weights
from engines.weights import Manifest, StoredWeight
from export.errors import ExportError
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from export.parallel.weights import rank_tensor
from model_defs.checkpoint.create import create_checkpoint
from model_defs.checkpoint.reader import Checkpoint
from model_defs.config import ModelConfig
from model_defs.presets import preset
from model_defs.weights import weight_recipes

MAPPINGS = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (4, 1, 4), (8, 1, 8), (8, 4, 2)]


def small_config(**sizes: Any) -> ModelConfig:
    """Two layers, one of each kind."""
    some = {"hidden_size": 16, "head_dim": 4, "rotary_dim": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    kinds = {"layer_kinds": ("lightning", "softmax"), "slope_layers": 2, "bos_token_id": None, "eos_token_id": None}
    return dataclasses.replace(preset("tiny"), **(some | kinds | sizes))


def rank_model(plan: ShardingPlan, rank: int, source: Checkpoint, dtype: str) -> ir.Model:
    """The weights of a rank, bound, without the graph that uses them."""
    values = []
    for name, recipe in weight_recipes(plan.config).items():
        kind = ir.TensorType(ir.DataType[dtype.upper()])
        value = ir.Value(name=name, type=kind, shape=ir.Shape(plan.held_shape(name)))
        value.const_value = rank_tensor(name, recipe, value, plan, rank, source)
        values.append(value)
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, name="weights"), ir_version=10)


def placed(model: ir.Model, source: Checkpoint, folder: Path, assembled: bool) -> Manifest:
    """The list as a session reads it."""
    folder.mkdir()
    writer = EngineFiles(folder, folder)
    reference = CheckpointReference(str(source.folder), "")
    manifest = place_weights(
        model,
        writer,
        "weights.bin",
        reference,
        lambda stage, done, total: None,
        dtype_of=lambda name, tensor: tensor.dtype.numpy().name,
        assembled=assembled,
    )
    return Manifest.from_json(manifest.to_json(), "list")


def on_device(manifest: Manifest, roots: dict[str, Path], staging: int) -> dict[str, bytes]:
    files = [np.memmap(roots[file.root] / file.name, np.uint8, "r") for file in manifest.files]
    device = HostDevice()
    addresses = load_weights(device, [StoredWeight(record, files) for record in manifest.tensors], staging=staging)
    sizes = {record.name: record.nbytes for record in manifest.tensors}
    return {n: device.read(a, (sizes[n],), np.dtype(np.uint8)).tobytes() for n, a in addresses.items()}


def check_rank(config: ModelConfig, sizes: tuple[int, int, int], rank: int, staging: int, dtype: str) -> None:
    plan = ShardingPlan(config, ParallelMapping(*sizes))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = create_checkpoint(config, folder / "c", with_tokenizer=False, max_shard_bytes=40_000)
        oracle = {
            name: value.const_value for name, value in rank_model(plan, rank, source, dtype).graph.initializers.items()
        }
        wanted = {name: np.ascontiguousarray(tensor.numpy()).tobytes() for name, tensor in oracle.items()}
        for assembled in (True, False):
            own = folder / str(assembled)
            manifest = placed(rank_model(plan, rank, source, dtype), source, own, assembled)
            found = on_device(manifest, {"checkpoint": source.folder, "engine": own}, staging)
            assert found == wanted
            written = [record.name for record in manifest.tensors if manifest.is_written(record)]
            assert (written == []) == (assembled and dtype == "bfloat16")


@settings(max_examples=20)
@given(
    st.sampled_from(MAPPINGS),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(9, 40),
    st.integers(0, 7),
    st.integers(50, 3000),
)
def test_a_rank_has_the_same_bytes_on_its_device_either_way(
    sizes: tuple[int, int, int], experts: int, width: int, vocabulary: int, rank: int, staging: int
) -> None:
    """Of every weight of every kind of cut, the vocabulary that does not divide among them."""
    config = small_config(
        num_local_experts=sizes[2] * max(experts, 2 // sizes[2]),
        intermediate_size=sizes[1] * width,
        vocab_size=vocabulary,
    )
    check_rank(config, sizes, rank % sizes[0], staging, "bfloat16")


def test_weights_of_another_type_are_written() -> None:
    check_rank(small_config(), (2, 2, 1), 1, 1000, "float16")


@st.composite
def weights(draw: st.DrawFn) -> tuple[list[np.ndarray], list[Piece]]:
    random = np.random.default_rng(draw(st.integers(0, 100)))
    files = [random.integers(0, 256, draw(st.integers(1, 300)), np.uint8) for _ in range(draw(st.integers(1, 3)))]
    pieces = []
    for _ in range(draw(st.integers(0, 4))):
        width, times = draw(st.integers(0, 20)), draw(st.integers(0, 8))
        strands = []
        for _ in range(draw(st.integers(0, 3))):
            file, stride = draw(st.integers(0, len(files) - 1)), width + draw(st.integers(0, 9))
            room = len(files[file]) - width - max(0, times - 1) * stride
            if room >= 0:
                strands.append(Strand(file, draw(st.integers(0, room)), stride))
        pieces.append(Piece(tuple(strands), width, times))
    return files, pieces


@given(weights(), st.integers(1, 70))
def test_pieces_are_what_is_said_of_them(made: tuple[list[np.ndarray], list[Piece]], staging: int) -> None:
    files, pieces = made
    wanted = b""
    for piece in pieces:
        for time in range(piece.times):
            for s in piece.strands:
                start = s.offset + time * s.stride
                wanted += files[s.file][start : start + piece.width].tobytes()
            wanted += b"" if piece.strands else bytes(piece.width)
    check_pieces(pieces, len(wanted), [len(file) for file in files])
    assert [Piece.from_plain(json.loads(json.dumps(piece.to_plain()))) for piece in pieces] == pieces
    found = [block.tobytes() for block in blocks(pieces, files, np.full(staging, 7, np.uint8))]
    assert b"".join(found) == wanted
    assert all(len(block) <= staging for block in found)


def _listed(**changes: Any) -> dict[str, Any]:
    """Two experts of 2 gate and 2 up rows of 3 float32 each, in one file."""
    pieces = [[[[0, e * 48, 12], [0, e * 48 + 24, 12]], 12, 2] for e in range(2)]
    tensor = {"name": "fc1", "dtype": "float32", "shape": [2, 4, 3], "nbytes": 96, "pieces": pieces}
    file = {"root": "checkpoint", "name": "model.safetensors", "size": 96, "sampled": ""}
    return {"files": [file], "tensors": [tensor | changes], "parts": {}}


def _with(piece: Any) -> dict[str, Any]:
    pieces = _listed()["tensors"][0]["pieces"]
    return _listed(pieces=[piece, pieces[1]])


def test_a_list_of_pieces_is_read() -> None:
    (record,) = Manifest.from_json(json.dumps(_listed()), "list").tensors
    file = np.arange(96, dtype=np.uint8)
    rows = file.reshape(2, 2, 2, 12)  # expert, gate or up, row
    found = StoredWeight(record, [file]).array()
    assert (found.shape, found.dtype) == ((2, 4, 3), np.float32)
    assert np.array_equal(found.view(np.uint8).reshape(-1), rows.transpose(0, 2, 1, 3).reshape(-1))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_with([[[0, 60, 12], [0, 24, 12]], 12, 4]), "a piece lies outside its file"),
        (_with([[[0, 73, 12], [0, 24, 12]], 12, 2]), "a piece lies outside its file"),
        (_with([[[0, -1, 12], [0, 24, 12]], 12, 2]), "a piece lies outside its file"),
        (_with([[[0, 0, 12], [0, 24, 2**62]], 12, 2]), "a piece lies outside its file"),
        (_with([[[0, 0, 12], [0, 24, 2**64]], 12, 1]), "something else than numbers"),
        (_with([[[0, 0, 12], [0, 24, 1.5]], 12, 2]), "something else than numbers"),
        (_with([[[0, True, 12], [0, 24, 12]], 12, 2]), "something else than numbers"),
        (_with([[[0, "0", 12], [0, 24, 12]], 12, 2]), "something else than numbers"),
        (_with([[[1, 0, 12], [0, 24, 12]], 12, 2]), "bytes of file 1, of 1 files"),
        (_with([[[-1, 0, 12], [0, 24, 12]], 12, 2]), "bytes of file -1, of 1 files"),
        (_with([[[0, 0, 11], [0, 24, 12]], 12, 2]), "some of them twice"),
        (_with([[[0, 0, -12], [0, 24, 12]], 12, 2]), "some of them twice"),
        (_with([[[0, 0, 12], [0, 24, 12]], -12, -2]), "takes -12 bytes -2 times"),
        (_with([[[0, 0, 12]], 12, 2]), "the pieces are 72 bytes together, the shape needs 96"),
        (_with([[], 2**60, 2**60]), "together, the shape needs 96"),
        (_with([[[0, 0]], 12, 2]), "not a list of weights"),
        (_with("piece"), "not a list of weights"),
        (_listed(pieces=None), "not a list of weights"),
        (_listed(pieces=[]), "the pieces are 0 bytes together"),
        (_listed(offset=0), "not a list of weights"),
        (_listed(shape=[2, 4, 4]), "fc1 has 96 bytes, its shape needs 128"),
    ],
)
def test_a_bad_list_of_pieces_is_refused_in_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        Manifest.from_json(json.dumps(raw), "rank0.weights.json")
    assert str(caught.value).startswith("rank0.weights.json: not a list of weights (")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    config = small_config()
    source = create_checkpoint(config, tmp_path / "c", with_tokenizer=False)
    name = next(name for name in source.entries if name.endswith("experts.1.w2.weight"))
    rows, columns = source.entries[name].shape
    source.entries[name] = dataclasses.replace(source.entries[name], shape=(columns, rows))
    with pytest.raises(ExportError, match=rf"experts\.1\.w2.*\[{columns}, {rows}\]"):
        rank_model(ShardingPlan(config, ParallelMapping(1, 1, 1)), 0, source, "bfloat16")


def test_a_list_of_weights_that_nests_without_end_is_refused() -> None:
    with pytest.raises(EngineError, match="not a list of weights"):
        Manifest.from_json('{"files":' + "[" * 200_000, "rank0.weights.json")
