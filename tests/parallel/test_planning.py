"""Memory plans and rooflines against the published figures and an independent computation (reference: facts, section 8)."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from click.testing import CliRunner

from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.presets import preset
from mxcompile.cli.plan import command
from mxcompile.errors import MxcompileError
from mxcompile.planning.gpus import gpu
from mxcompile.planning.memory import SCHEMES, Demand, WeightScheme, fit, parse_tokens, rank_memory, weight_bytes
from mxcompile.planning.report import plan_report
from mxcompile.planning.roofline import (
    decode,
    matmul_flops,
    prefill,
    segment_bytes,
    softmax_flops,
    touched_experts,
)

PLAN = ShardingPlan(preset("text-01"), ParallelMapping.of(8, moe_ep_size=8))
K, M = 1024, 1024**2
# The reference prints three digits and splits norms and routers, 0.03 GB, over the ranks where we count them on each.
GB_TOLERANCE = 0.1
# Three printed digits.
DIGITS = 0.005


@pytest.mark.parametrize(
    ("scheme", "total", "per_gpu"),
    [
        ("bf16", 912.2, 114.0),
        ("int8-experts", 477.3, 59.7),
        ("int8", 458.6, 57.3),
        ("int4-experts", 247.9, 31.0),
        ("int4", 238.8, 29.9),
    ],
)
def test_weight_bytes(scheme: str, total: float, per_gpu: float) -> None:
    whole = ShardingPlan(preset("text-01"), ParallelMapping())
    assert weight_bytes(whole, SCHEMES[scheme], 0) / 1e9 == pytest.approx(total, abs=GB_TOLERANCE)
    assert weight_bytes(PLAN, SCHEMES[scheme], 0) / 1e9 == pytest.approx(per_gpu, abs=GB_TOLERANCE)


def test_weights_of_a_cpu_rank_that_cannot_be_quantized_say_why() -> None:
    """`small`: 9 blocks of 64 inner channels do not divide by two ranks, 18 of 32 do."""
    found = plan_report(preset("small"), ParallelMapping.of(2), [], [], [])["per_rank"]["cpu_weight_bytes"]
    whole = plan_report(preset("small"), ParallelMapping(), [], [], [])["per_rank"]["cpu_weight_bytes"]
    assert "moe_ep_size 2 leaves experts whole" in found["--quantize int8"]
    assert whole["--quantize int4"] / 2 < found["--quantize int4"] < whole["--quantize int4"] < whole["fp32"] / 2
    assert whole["fp32"] == 4 * sum(preset("small").parameter_counts().values())


@pytest.mark.parametrize(
    ("scheme", "context", "cache_bytes", "expected"),
    [
        ("int8-experts", 128 * K, 2, 60.4),
        ("int8-experts", M, 2, 65.1),
        ("int8-experts", 4 * M, 1, 70.4),
        ("int8", M, 2, 62.7),
        ("int4-experts", 4 * M, 2, 52.5),
        ("int4-experts", 128 * K, 1, 31.4),
    ],
)
def test_memory_per_gpu(scheme: str, context: int, cache_bytes: int, expected: float) -> None:
    memory = rank_memory(PLAN, Demand(SCHEMES[scheme], context, cache_bytes=cache_bytes))
    assert memory.data / 1e9 == pytest.approx(expected, abs=GB_TOLERANCE)


@pytest.mark.parametrize(("scheme", "longest"), [("int8-experts", 4.4e6), ("int8", 4.9e6), ("int4-experts", 10.0e6)])
def test_longest_context_on_h20(scheme: str, longest: float) -> None:
    found = fit(PLAN, Demand(SCHEMES[scheme], M), gpu("h20"))
    assert found.fits
    assert found.longest_context == pytest.approx(longest, abs=0.06e6)


def test_bf16_fits_eight_h200_but_not_eight_h20() -> None:
    demand = Demand(SCHEMES["bf16"], M)
    h20, h200 = fit(PLAN, demand, gpu("h20")), fit(PLAN, demand, gpu("h200"))
    assert not h20.fits
    assert "weights alone are 114.1 GB" in h20.reason
    assert "take 16 such GPUs" in h20.reason
    assert h200.fits
    too_long = fit(PLAN, Demand(SCHEMES["bf16"], 4 * M), gpu("h200"))
    assert not too_long.fits
    assert "1.6M tokens" in too_long.reason


def test_the_longest_context_is_the_last_that_fits() -> None:
    demand = Demand(SCHEMES["int8"], K, batch=3)
    longest = fit(PLAN, demand, gpu("h20")).longest_context
    assert fit(PLAN, Demand(SCHEMES["int8"], longest, batch=3), gpu("h20")).fits
    assert not fit(PLAN, Demand(SCHEMES["int8"], longest + 1, batch=3), gpu("h20")).fits


def test_flops_of_a_token() -> None:
    config = preset("text-01")
    assert matmul_flops(config) / 1e9 == pytest.approx(91.89, rel=DIGITS)
    assert softmax_flops(config, 1) == 327_680
    # where the softmax core equals all matrix products
    assert matmul_flops(config) / softmax_flops(config, 1) == pytest.approx(280_416, rel=1e-3)


@pytest.mark.parametrize(
    ("context", "pflop", "share"),
    [(4 * K, 0.383, 0.007), (128 * K, 14.97, 0.188), (M, 277.4, 0.649), (4 * M, 3271, 0.881)],
)
def test_prefill_flops(context: int, pflop: float, share: float) -> None:
    found = prefill(PLAN, gpu("h20"), context)
    assert found.flops / 1e15 == pytest.approx(pflop, rel=DIGITS)
    assert found.softmax_share == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize(
    ("context", "full", "three_quarters"), [(8 * K, 0.65, 0.87), (128 * K, 12.7, 16.9), (M, 234, 312)]
)
def test_prefill_bound_on_h20(context: int, full: float, three_quarters: float) -> None:
    found = prefill(PLAN, gpu("h20"), context)
    assert found.seconds == pytest.approx(full, rel=0.01)
    assert found.at(0.75) == pytest.approx(three_quarters, rel=0.01)


def test_prefill_bound_on_hopper_of_full_rate() -> None:
    assert prefill(PLAN, gpu("h100"), M).seconds == pytest.approx(35, rel=0.01)


@pytest.mark.parametrize(
    ("batch", "context", "rate"),
    [
        (1, 4 * K, 668),
        (32, 4 * K, 2416),
        (128, 4 * K, 7429),
        (256, 4 * K, 12326),
        (32, 128 * K, 32 / 18.5e-3),
        (1, M, 1 / 2.83e-3),
    ],
)
def test_decode_bound_on_h20(batch: int, context: int, rate: float) -> None:
    # The reference counts one byte for every weight, lm_head included.
    bytes_each = WeightScheme("all", "", Fraction(1), Fraction(1), Fraction(1))
    assert decode(PLAN, gpu("h20"), bytes_each, batch, context).tokens_per_second == pytest.approx(rate, rel=0.01)


def test_large_batches_on_h20_are_bound_by_arithmetic() -> None:
    assert decode(PLAN, gpu("h20"), SCHEMES["int8"], 256, 4 * K).bound == "arithmetic"
    assert decode(PLAN, gpu("h200"), SCHEMES["int8"], 256, 4 * K).bound == "memory"


@pytest.mark.parametrize(("batch", "experts"), [(8, 12.9), (32, 27.9), (128, 32.0)])
def test_touched_experts(batch: int, experts: float) -> None:
    assert touched_experts(preset("text-01"), batch) == pytest.approx(experts, abs=0.05)


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 2), (8, 4)])
def test_what_ranks_exchange_that_share_a_chunk(tp_size: int, cp_size: int) -> None:
    plan = ShardingPlan(preset("text-01"), ParallelMapping.of(tp_size, cp_size=cp_size))
    # 70 layers of 64 heads with fp32 states of 128 x 128, and 40,960 bytes of bf16 keys and values per token (facts, 8.3)
    states = (cp_size - 1) * 70 * 64 * 128 * 128 * 4 // tp_size
    for chunk in (4 * K, 64 * K):
        found = segment_bytes(plan, chunk)
        assert found["states that segments leave"] == states
        assert found["keys and values"] == (cp_size - 1) * (chunk // cp_size) * 40_960 // tp_size
    assert segment_bytes(PLAN, 4 * K) == {}


def test_ranks_that_share_a_chunk_hold_everything_and_divide_the_arithmetic() -> None:
    two = ShardingPlan(preset("text-01"), ParallelMapping.of(8, moe_ep_size=8, cp_size=2))
    demand = Demand(SCHEMES["int8-experts"], M)
    one, shared = rank_memory(PLAN, demand), rank_memory(two, demand)
    assert (shared.weights, shared.state, shared.cache) == (one.weights, one.state, one.cache)
    assert shared.workspace < one.workspace
    h20 = gpu("h20")
    assert prefill(two, h20, M).seconds == pytest.approx(prefill(PLAN, h20, M).seconds / 2)
    # Of 256 chunks: half of the all-reduces, and 35 MiB of states and 10 MiB of keys and values in each.
    exchanged = prefill(PLAN, h20, M).exchange_seconds / 2 + 256 * (45 * 2**20 + 6144 * 2) / h20.link
    assert prefill(two, h20, M).exchange_seconds == pytest.approx(exchanged)
    assert decode(two, h20, SCHEMES["int8"], 1, M).seconds == decode(PLAN, h20, SCHEMES["int8"], 1, M).seconds
    too_much = fit(ShardingPlan(preset("text-01"), ParallelMapping.of(8, cp_size=2)), Demand(SCHEMES["bf16"], M), h20)
    assert "take 32 such GPUs" in too_much.reason  # twice the ranks in each of the two sets


@pytest.mark.parametrize(("text", "tokens"), [("5000", 5000), ("128k", 131072), ("1M", 1048576), ("4m", 4194304)])
def test_token_counts(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "1.5M", "-3", "0", "1g"])
def test_wrong_token_counts(text: str) -> None:
    with pytest.raises(MxcompileError, match="number of tokens"):
        parse_tokens(text)


def test_command_prints_json_and_tables() -> None:
    result = CliRunner().invoke(command, ["--moe-ep-size", "8", "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["parameters"]["total"] == 456_089_655_296
    assert sum(report["parameters"]["per_rank"]) - report["parameters"]["copies"] == 456_089_655_296
    assert {(row["gpu"], row["scheme"]) for row in report["fits"]} == {
        (g, s) for g in ("h20", "h100", "h200") for s in SCHEMES
    }
    # no bound for what does not fit
    assert not any(row["gpu"] == "h20" and row["scheme"] == "bf16" for row in report["decode"])
    table = CliRunner().invoke(command, ["--gpu", "h20", "--weights", "int8"], catch_exceptions=False).stdout
    assert "456,089,655,296" in table
    assert "Assumptions:" in table


def test_command_shows_what_a_chunk_costs() -> None:
    arguments = ["--gpu", "h20", "--weights", "int8", "--tp-size", "8", "--cp-size", "2"]
    report = json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert report["mapping"]["cp_size"] == 2
    assert sum(report["parameters"]["per_rank"]) - report["parameters"]["copies"] == 456_089_655_296
    assert [item["bytes_received_per_chunk"] for item in report["segment_exchanges"]] == [35 * 2**20, 10 * 2**20, 12288]
    table = CliRunner().invoke(command, arguments, catch_exceptions=False).stdout
    assert "in 2 sets that share a chunk's tokens" in table
    assert "every set of ranks has the whole model" in table
    assert "35.0 MiB" in table


def test_command_reads_the_configuration_of_a_checkpoint(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = CliRunner().invoke(command, [str(tmp_path / "nowhere"), "--json"])
    assert result.exception is not None
    assert getattr(result.exception, "exit_code", None) == 2
