"""Quantized weights on several ranks: a rank's numbers are slices of one rank's, and engines of both compute the same."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
from engines_on_ranks import Workshop
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import load
from engines.directory import read_config
from engines.onnxruntime.session import QUANTIZED_PREFILL_FROM
from engines.weights import map_weights
from export.errors import ExportError
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan, rule_of
from export.parallel.weights import rank_tensor
from export.quantize import QuantizationError
from export.quantize_blocks import check_blocks, quantized_blocks
from export.weights import bound_tensor
from model_defs.checkpoint.reader import Checkpoint
from model_defs.config import ModelConfig
from model_defs.presets import preset
from model_defs.quantization import WHOLE, block_scheme
from model_defs.weights import weight_recipes
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.checkpoints import create_checkpoint
from mxcompile.inspection import inspect
from mxcompile.planning.memory import cpu_weight_bytes
from mxcompile.refitting import refit
from mxcompile.validation.options import ValidationOptions
from mxcompile.validation.run import UNROUNDED, validate

# As tests/parallel/test_ranks.py has it for fp32, logits of scale 6 and sums in another order.
TOLERANCE = 2e-4
INT8, INT4, EXPERTS = {"weights": "int8"}, {"weights": "int4"}, {"experts": "int8"}
CASES = [  # how, and the sizes tp, moe_tp, moe_ep, cp
    pytest.param(INT8, (2, 2, 1), id="int8-tp"),
    pytest.param(INT4, (2, 1, 2), id="int4-ep"),
    pytest.param(INT8, (4, 2, 2), id="int8-tp-ep"),
    pytest.param(INT4, (1, 1, 1, 2), id="int4-cp"),
    pytest.param(EXPERTS, (2, 1, 2), id="experts-ep"),
]
# The vocabulary divides by no number of ranks: the last one has rows of zeros.
TWO_LAYERS = dataclasses.replace(preset("tiny"), layer_kinds=("lightning", "softmax"), slope_layers=2, vocab_size=511)


# --- numbers --------------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    kind: str
    config: ModelConfig
    mapping: ParallelMapping


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Models of one layer of each kind, and mappings that cut their blocks nowhere."""
    kind = draw(st.sampled_from(["int8", "int4"]))
    moe_tp, moe_ep = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]))
    block, tp = WHOLE[kind].block, moe_tp * moe_ep
    config = dataclasses.replace(
        TWO_LAYERS,
        hidden_size=64 * draw(st.integers(1, 3)),
        head_dim=block,
        rotary_dim=block // 2,
        num_attention_heads=tp * draw(st.integers(1, 2)),
        num_key_value_heads=draw(st.sampled_from([1, tp])),
        intermediate_size=block * moe_tp * draw(st.integers(1, 2)),
        num_local_experts=moe_ep * draw(st.integers(1, 2)) + moe_ep,
        vocab_size=draw(st.integers(500, 530)),
        bos_token_id=None,
        eos_token_id=499,
    )
    return Sizes(kind, config, ParallelMapping(tp, moe_tp, moe_ep))


def stored(tensor: ir.TensorProtocol, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What an engine holds of a weight: numbers by block, and scales."""
    scheme = block_scheme(name, kind)
    assert scheme is not None
    numbers, scales = (made.numpy() for made in quantized_blocks(tensor, scheme, QuantizationError()))
    return numbers.reshape(*scales.shape, -1), scales


@given(sizes())
@settings(max_examples=12, deadline=None)
def test_a_ranks_numbers_are_slices_of_those_of_one_rank(
    tmp_path_factory: pytest.TempPathFactory, given_sizes: Sizes
) -> None:
    """Rows, experts and whole blocks of columns; rows of the vocabulary that nobody has are zeros."""
    kind, config, mapping = given_sizes
    check_blocks(config, kind, mapping)
    folder = tmp_path_factory.mktemp("c") / "c"
    create_checkpoint(config, folder)
    source: Any = Checkpoint.open(folder)
    plan = ShardingPlan(config, mapping)
    for name, recipe in weight_recipes(config).items():
        scheme = block_scheme(name, kind)
        if scheme is None:
            continue

        def value(shape: tuple[int, ...], name: str = name) -> ir.Value:
            return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

        whole = stored(bound_tensor(name, recipe, value(plan.shapes[name]), source), name, kind)
        for rank in mapping.ranks:
            mine = value(plan.held_shape(name))
            found = stored(rank_tensor(name, recipe, mine, plan, rank, source), name, kind)
            *rows, (start, end) = plan.part(name, rank).ranges
            blocks = slice(start // scheme.block, end // scheme.block)
            cut = (*(slice(*row) for row in rows), blocks)
            for ours, theirs in zip(found, whole, strict=True):
                expected = theirs[cut]
                assert np.array_equal(ours[: len(expected)], expected), name
            behind = found[0][len(whole[0][cut]) :]
            assert (behind == (128 if scheme.bits == 8 else 0x88)).all()


def test_columns_that_ranks_would_cut_inside_a_block_are_refused_with_sizes_that_work() -> None:
    """`small` has 9 blocks of 64 inner channels per expert, and 18 of 32."""
    with pytest.raises(ExportError, match=r"inner width of 576 in blocks of 64 .* near it: 1; moe_ep_size 2") as caught:
        check_blocks(preset("small"), "int8", ParallelMapping.of(2))
    assert caught.value.exit_code == 2
    check_blocks(preset("small"), "int4", ParallelMapping.of(2))
    check_blocks(preset("small"), "int8", ParallelMapping.of(2, moe_ep_size=2))
    with pytest.raises(ExportError, match=r"heads' width of 128 in blocks of 64 .* possible near it: 2"):
        check_blocks(
            dataclasses.replace(preset("tiny"), num_attention_heads=4, head_dim=32), "int8", ParallelMapping.of(4)
        )
    for kind in WHOLE:
        check_blocks(preset("text-01"), kind, ParallelMapping.of(8))


# --- engines --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("quantized"), TWO_LAYERS)


def walk(session: Any) -> tuple[np.ndarray, list[list[int]]]:
    """Two prompts, of which 96 tokens each go to the graph for many tokens at once, the rest and greedy steps to the other."""
    state = session.new_state(2)
    prompts = [list(range(1, 101)), list(range(400, 300, -1))]
    assert 2 * 96 >= QUANTIZED_PREFILL_FROM > 2 * 4
    logits, tokens = [session.prefill(prompts, state, chunk=96)], []
    for _ in range(24):
        tokens.append(logits[-1].argmax(-1).tolist())
        logits.append(session.decode(tokens[-1], state))
    return np.stack(logits), tokens


@pytest.mark.parametrize(("how", "sizes"), CASES)
def test_ranks_compute_what_one_rank_does(workshop: Workshop, how: dict[str, str], sizes: tuple[int, ...]) -> None:
    """Without packed weights activations are not rounded: then it is fp32 on both sides, with the limits of unquantized ranks."""
    mpi()
    expected, tokens = walk(load(workshop.engine(1, 1, 1, how=how), threads=1, prepack=False))
    with load(workshop.engine(*sizes, how=how), threads=1, prepack=False) as session:  # type: ignore[attr-defined]
        found, ours = walk(session)
    assert ours == tokens
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize(("how", "sizes"), [CASES[0]])
def test_rounded_activations_differ_by_ties_only(
    workshop: Workshop, how: dict[str, str], sizes: tuple[int, ...]
) -> None:
    """As users run it. Sums over ranks are off by parts in a million, which moves few activations over a tie, one step of 127: half of
    all logits stay within the limit of fp32, far from what rounding itself does to them.
    """
    mpi()
    prompt = [list(range(1, 60))]

    def logits(session: Any) -> np.ndarray:
        return session.forward(prompt, [59], session.new_state(1), positions="all").logits[0]

    one = workshop.engine(1, 1, 1, how=how)
    used, exact = (logits(load(one, threads=1, prepack=packed)) for packed in (True, False))
    with load(workshop.engine(*sizes, how=how), threads=1) as session:  # type: ignore[attr-defined]
        found = logits(session)
    assert np.median(np.abs(found - used)) < TOLERANCE
    assert np.median(np.abs(found - exact)) > 10 * TOLERANCE


@pytest.mark.parametrize(("how", "sizes"), CASES[:3])
def test_files_of_ranks_hold_slices_of_one_ranks(
    workshop: Workshop, how: dict[str, str], sizes: tuple[int, ...]
) -> None:
    whole, folder = workshop.engine(1, 1, 1, how=how), workshop.engine(*sizes, how=how)
    config, plan = read_config(folder), ShardingPlan(workshop.config, ParallelMapping(*sizes))
    theirs = map_weights(whole, read_config(whole), "rank0.weights.json")
    for files in config.ranks:
        assert files.weights is not None
        ours = map_weights(folder, config, files.weights)
        for name in plan.shapes:
            scale = f"{name}.scale"
            assert (scale in ours) == (scale in theirs) == (block_scheme(name, how["weights"]) is not None)
            if scale in ours and not any(shared.name == "VOCABULARY" for _, shared in rule_of(name).cuts):
                part = plan.part(name, files.rank).ranges
                block = plan.shapes[name][-1] // theirs[scale].shape[-1]
                cut = (*(slice(*row) for row in part[:-1]), slice(part[-1][0] // block, part[-1][1] // block))
                assert np.array_equal(ours[scale], theirs[scale][cut])
                numbers = theirs[name].reshape(*theirs[scale].shape, -1)[cut]
                assert np.array_equal(ours[name].reshape(numbers.shape), numbers)


@pytest.mark.parametrize(("how", "sizes"), [CASES[0]])
def test_validate_judges_ranks_as_it_does_one(workshop: Workshop, how: dict[str, str], sizes: tuple[int, ...]) -> None:
    mpi()
    options = ValidationOptions(quick=True, lengths=(1, 65), threads=1)
    report = validate(workshop.engine(*sizes, how=how), workshop.checkpoint.folder, options)
    assert report.passed, [check for check in report.checks if check.status != "passed"]
    assert sum(check.group.startswith(UNROUNDED) for check in report.checks) >= 5
    assert report.engine["quantization"]["effect"]["kl_divergence"] > 0


def test_ranks_that_share_inner_widths_scale_rows_by_their_own_columns(workshop: Workshop) -> None:
    """`--quantize-experts`: the reference has as many scales per row of fc2 as ranks share it, or it would be off."""
    mpi()
    prompts = [list(range(1, 60))]

    def logits(session: Any) -> np.ndarray:
        return session.prefill(prompts, session.new_state(1))

    with load(workshop.engine(2, 2, 1, how=EXPERTS), threads=1) as session:  # type: ignore[attr-defined]
        found = logits(session)
    reference, other = (
        logits(PyTorchSession.load(workshop.checkpoint, quantize_experts="int8", expert_parts=parts))
        for parts in (2, 1)
    )
    assert np.abs(found - reference).max() < TOLERANCE
    assert np.abs(found - other).max() > 10 * TOLERANCE


@pytest.mark.parametrize(("how", "sizes"), CASES[1:2])
def test_refitted_ranks_are_those_that_a_build_makes(
    workshop: Workshop, how: dict[str, str], sizes: tuple[int, ...], other: Path, tmp_path: Path
) -> None:
    mpi()
    built = workshop.engine(*sizes, how=how)
    shutil.copytree(built, tmp_path / "e")
    refit(tmp_path / "e", other)
    assert read_config(tmp_path / "e").quantization != read_config(built).quantization
    refit(tmp_path / "e", workshop.checkpoint.folder)
    ours, theirs = read_config(tmp_path / "e"), read_config(built)
    assert {name: record for name, record in ours.files.items() if name.startswith("rank")} == theirs.files
    assert ours.quantization == theirs.quantization


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "c"
    create_checkpoint(TWO_LAYERS, folder, seed=1, dtype="float32")
    return folder


@pytest.mark.parametrize(("how", "sizes"), CASES[1:3])
def test_the_plan_knows_the_bytes_of_a_rank(workshop: Workshop, how: dict[str, str], sizes: tuple[int, ...]) -> None:
    folder, plan = workshop.engine(*sizes, how=how), ShardingPlan(workshop.config, ParallelMapping(*sizes))
    for files in read_config(folder).ranks:
        assert files.weights is not None
        arrays = map_weights(folder, read_config(folder), files.weights)
        found = sum(arrays[name].nbytes + getattr(arrays.get(f"{name}.scale"), "nbytes", 0) for name in plan.shapes)
        assert found == cpu_weight_bytes(plan, how["weights"], files.rank)


def test_inspect_counts_the_operators_of_a_rank(workshop: Workshop) -> None:
    found = inspect(workshop.engine(4, 2, 2, how=INT8))
    assert found["quantization"]["weights"] == "int8"
    assert found["operators"]["com.microsoft::MatMulNBits"] == 3 + 4 + 1
    assert found["operators"]["com.microsoft::QMoE"] == 2


def mpi() -> None:
    """Skip where ranks cannot be run."""
    pytest.importorskip("mpi4py", reason="running several ranks needs mpi4py and an MPI launcher")
