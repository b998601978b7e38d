"""`mxcompile build --quantize`: the numbers, the engine beside PyTorch with weights rounded alike, what is refused and found broken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import load
from engines.directory import read_config
from engines.errors import EngineError
from engines.onnxruntime.session import QUANTIZED_PREFILL_FROM
from engines.onnxruntime.session import load as load_onnxruntime
from model_defs.presets import preset
from model_defs.quantization import WHOLE, dequantize_blocks, quantize_blocks
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.bench.drift import drift
from mxcompile.bench.perplexity import perplexity
from mxcompile.bench.perplexity_results import REFERENCE, TWIN, YARDSTICK, verdict
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.cli.main import main
from mxcompile.errors import MxcompileError
from mxcompile.inspection import inspect
from mxcompile.refitting import refit
from mxcompile.validation.options import ValidationOptions
from mxcompile.validation.run import UNROUNDED, validate

# Logits of about 6 in fp32, as mxcompile/validation/thresholds.py.
LIMIT = 2e-4
LIMITS = {"max_batch_size": 4, "max_seq_len": 128, "threads": 1}
KINDS = ("int8", "int4")


@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_a_weight_is_off_by_at_most_half_a_step_of_its_block(
    rows: int, blocks: int, size: float, kind: str, seed: int
) -> None:
    """In 4 bits a weight of the largest magnitude but the other sign may be off by a whole step: -8 has no counterpart."""
    scheme = WHOLE[kind]
    weight = (np.random.default_rng(seed).standard_normal((rows, blocks * scheme.block)) * size).astype(np.float32)
    weight[0, : scheme.block] = 0
    stored, scales = quantize_blocks(weight, scheme)
    assert stored.shape == (rows, blocks, scheme.block * scheme.bits // 8)
    off = np.abs(dequantize_blocks(stored, scales, scheme) - weight).reshape(rows, blocks, -1)
    steps = np.abs(scales)[..., None]
    clipped = (scheme.bits == 4) & (weight.reshape(off.shape) / scales[..., None] > 7.5)
    assert (off <= np.where(clipped, 1.0, 0.5001) * steps).all()
    largest = np.abs(weight).reshape(off.shape).max(-1)
    assert (np.abs(scales) <= largest / (2 ** (scheme.bits - 1) - 1) * 1.0001)[largest > 0].all()
    assert scales[0, 0] == 1
    assert not off[0, 0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_quantize_alone_as_they_do_among_others(kind: str) -> None:
    scheme = WHOLE[kind]
    weight = np.random.default_rng(0).standard_normal((1500, 2 * scheme.block)).astype(np.float32)
    stored, scales = quantize_blocks(weight, scheme)
    part = quantize_blocks(weight[1200:1203, scheme.block :], scheme)
    assert np.array_equal(part[0][:, 0], stored[1200:1203, 1])
    assert np.array_equal(part[1][:, 0], scales[1200:1203, 1])
    for wrong, words in ((weight[:, :-1], "no multiple"), (weight * np.inf, "not finite")):
        with pytest.raises(ValueError, match=words):
            quantize_blocks(wrong, scheme)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of each kind, stored in bfloat16."""
    config = dataclasses.replace(preset("tiny"), layer_kinds=("lightning", "softmax"), slope_layers=2)
    folder = tmp_path_factory.mktemp("quantize") / "c"
    create_checkpoint(config, folder)
    return folder


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> dict[str, Path]:
    folders = {kind: checkpoint.parent / kind for kind in KINDS}
    for kind, folder in folders.items():
        build(checkpoint, folder, quantize=kind, **LIMITS)  # type: ignore[arg-type]
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_what_pytorch_does_with_weights_rounded_alike(
    checkpoint: Path, engines: dict[str, Path], kind: str
) -> None:
    """All graphs, on the prompt in one piece (experts as products) and token by token (QMoE). Without packed weights activations are
    fp32, and so are the limits; as users run it, the engine is as near PyTorch with int8 activations as rounding ties allow.
    """
    prompts = [list(range(1, 101)), list(range(400, 300, -1))]
    assert sum(map(len, prompts)) >= QUANTIZED_PREFILL_FROM

    def logits(session: PyTorchSession | object) -> np.ndarray:
        state = session.new_state(2)  # type: ignore[attr-defined]
        first = session.prefill(prompts, state)  # type: ignore[attr-defined]
        return np.stack([first, *(session.decode([5 + step, 6], state) for step in range(3))])  # type: ignore[attr-defined]

    exact = logits(load_onnxruntime(engines[kind], threads=1, prepack=False))
    used = logits(load(engines[kind], threads=1))
    rounded, own = (logits(PyTorchSession.load(checkpoint, quantize=how)) for how in (kind, None))
    int8 = logits(PyTorchSession.load(checkpoint, quantize=kind, int8_activations=True))
    assert np.abs(exact - rounded).max() < LIMIT
    assert np.abs(exact - own).max() > 10 * LIMIT
    assert np.median(np.abs(used - int8)) < np.median(np.abs(used - rounded)) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_validate_passes_and_says_what_rounding_costs(checkpoint: Path, engines: dict[str, Path], kind: str) -> None:
    report = validate(engines[kind], checkpoint, ValidationOptions(quick=True, lengths=(1, 65), threads=1))
    assert report.passed, [check for check in report.checks if check.status != "passed"]
    assert sum(check.group.startswith(UNROUNDED) for check in report.checks) >= 5
    effect = report.engine["quantization"]["effect"]
    assert effect["kl_divergence"] > 0
    assert 0 < effect["same_first_token"] <= 1


def test_validate_finds_weights_that_were_rounded_otherwise(
    checkpoint: Path, engines: dict[str, Path], tmp_path: Path
) -> None:
    """An engine that says int8 and holds the weights in 4 bits."""
    build(checkpoint, tmp_path / "e", quantize="int4", **LIMITS)  # type: ignore[arg-type]
    text = (tmp_path / "e" / "config.json").read_text()
    (tmp_path / "e" / "config.json").write_text(text.replace('"weights": "int4"', '"weights": "int8"'))
    report = validate(tmp_path / "e", checkpoint, ValidationOptions(quick=True, lengths=(65,), threads=1))
    assert not report.passed


def test_perplexity_states_what_rounding_costs(engines: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The sea was calm, and the lamp in the tower turned. " * 8)
    report = perplexity(engines["int8"], tmp_path / "t.txt", context=100, threads=1)
    assert [side.name for side in report.sides] == ["engine", REFERENCE, TWIN, YARDSTICK]
    assert report.passed, verdict(report)
    assert "Rounding the weights changes the original's perplexity by" in verdict(report)
    with pytest.raises(MxcompileError, match="without --quantize"):
        drift(engines["int8"], None, (20,), threads=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize_experts": "int8"}, "experts included"),
        ({"target": "tensorrt-rtx"}, "--quantize-experts int8"),
        ({"target": "tensorrt"}, "--quantize-experts int8"),
        ({"device": "cuda"}, "for the CPU"),
        ({"quantize": "int3"}, "int8, int4"),
    ],
)
def test_what_does_not_exist_is_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(MxcompileError, match=words) as caught:
        build(checkpoint, tmp_path / "e", **{"quantize": "int8", **options})  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert not (tmp_path / "e").exists()


def test_the_command_refuses_two_ways_of_quantizing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(checkpoint), "-o", str(tmp_path / "e"), "--quantize", "int8", "--quantize-experts", "int8"]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "experts included" in capsys.readouterr().err


def test_a_width_that_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(
        preset("tiny"), layer_kinds=("lightning",), slope_layers=1, intermediate_size=112, vocab_size=512
    )
    create_checkpoint(config, tmp_path / "c")
    with pytest.raises(Exception, match="intermediate_size is 112") as caught:
        build(tmp_path / "c", tmp_path / "e", quantize="int4", **LIMITS)  # type: ignore[arg-type]
    assert getattr(caught.value, "exit_code", None) == 2


def test_ranks_that_would_cut_a_block_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"moe_tp_size 4: .* blocks of 64 .* near it: 2; moe_ep_size 4") as caught:
        build(checkpoint, tmp_path / "e", quantize="int8", tp_size=4, **LIMITS)  # type: ignore[arg-type]
    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "e").exists()


def test_ranks_are_quantized_alike_in_processes_and_without(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="building several ranks needs mpi4py and an MPI launcher, to try them")
    configs = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        build(checkpoint, folder, quantize="int4", tp_size=2, moe_ep_size=2, build_jobs=jobs, **LIMITS)  # type: ignore[arg-type]
        configs.append(read_config(folder))
    assert configs[0].files == configs[1].files
    assert configs[0].quantization == configs[1].quantization
    assert configs[0].quantization is not None
    assert configs[0].quantization["weights"] == "int4"


def test_inspect_tells_how_an_engine_is_quantized(engines: dict[str, Path]) -> None:
    found = {kind: inspect(engines[kind]) for kind in KINDS}
    for kind in KINDS:
        assert found[kind]["quantization"]["weights"] == kind
        assert found[kind]["operators"]["com.microsoft::MatMulNBits"] == 3 + 4 + 1
        assert found[kind]["operators"]["com.microsoft::QMoE"] == 2
    assert (
        found["int4"]["quantization"]["relative_weight_error"]
        > 5 * found["int8"]["quantization"]["relative_weight_error"]
        > 0
    )


def test_a_damaged_scale_or_part_is_found_by_its_digest(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    build(checkpoint, folder, quantize="int8", **LIMITS)  # type: ignore[arg-type]
    manifest = json.loads((folder / "rank0.weights.json").read_text())
    scale = next(item for item in manifest["tensors"] if item["name"] == "layers.1.self_attn.k_proj.weight.scale")
    whole = (folder / "rank0.weights.bin").read_bytes()
    with (folder / "rank0.weights.bin").open("r+b") as file:
        file.seek(scale["offset"])
        file.write(np.float32(1e9).tobytes())
    with pytest.raises(EngineError, match=r"rank0\.weights\.bin"):
        load(folder, threads=1)
    (folder / "rank0.weights.bin").write_bytes(whole)
    load(folder, threads=1)
    graph = folder / "rank0.onnx"  # another block size: 64 is what the attribute says, and the digest of the file
    changed = graph.read_bytes().replace(b"block_size\x18\x40", b"block_size\x18\x20", 1)
    assert changed != graph.read_bytes()
    graph.write_bytes(changed)
    with pytest.raises(EngineError, match=r"rank0\.onnx"):
        load(folder, threads=1)


def test_a_refitted_engine_is_the_one_that_a_build_makes(
    checkpoint: Path, engines: dict[str, Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(preset("tiny"), layer_kinds=("lightning", "softmax"), slope_layers=2)
    create_checkpoint(config, tmp_path / "other", seed=1)
    build(tmp_path / "other", tmp_path / "e", quantize="int4", **LIMITS)  # type: ignore[arg-type]
    refit(tmp_path / "e", checkpoint)
    ours, theirs = read_config(tmp_path / "e"), read_config(engines["int4"])
    assert ours.files == theirs.files
    assert ours.quantization == theirs.quantization
