"""`report`: the page says what the JSON says, wrong engines are named, and files that do not belong together are refused."""

from __future__ import annotations

import copy
import csv
import html
import io
import json
import math
import re

import pytest
from bench_models import made_bench, made_drift, made_perplexity

from model_defs.constants import decay_slopes, rotary_frequencies
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.bench.agreement import SAME
from mxcompile.bench.results import write_json
from mxcompile.checkpoints import create_checkpoint
from mxcompile.comparing import report, write
from mxcompile.errors import MxcompileError
from mxcompile.report.comparison import compare
from mxcompile.report.comparison_page import page
from mxcompile.report.comparison_text import to_csv, to_markdown
from mxcompile.report.conditions import parse, violations
from mxcompile.validation import ValidationOptions, validate


@pytest.fixture(scope="module")
def files(engine, checkpoint, tmp_path_factory):
    """A benchmark, a slower older one and a validation as files."""
    folder = tmp_path_factory.mktemp("files")
    write_json(made_bench(engine).to_dict(), folder / "new.json")
    write_json(made_bench(engine, factor=2.0).to_dict(), folder / "old.json")
    write_json(made_perplexity(engine).to_dict(), folder / "text.json")
    write_json(made_drift(engine).to_dict(), folder / "drift.json")
    found = validate(engine, checkpoint, ValidationOptions(quick=True, lengths=(20,), threads=2))
    write_json(found.to_dict(), folder / "validation.json")
    return folder


@pytest.fixture(scope="module")
def values(engine, checkpoint, files):
    return report(
        [engine],
        against=checkpoint,
        bench=[files / "new.json"],
        validation=[files / "validation.json"],
        perplexity=[files / "text.json"],
        state_drift=[files / "drift.json"],
        baseline=files / "old.json",
        price_per_hour=3.6,
    )


def lookup(values, key):
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def test_numbers_in_the_page_equal_the_json(values, tmp_path):
    write(values, html=tmp_path / "r.html", json=tmp_path / "r.json")
    stored, text = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.html").read_text()
    cells = re.findall(r'data-key="([^"]+)" data-value="([^"]+)">([^<]*)<', text)
    assert len(cells) > 100
    for key, value, shown in cells:
        assert json.loads(html.unescape(value)) == lookup(stored, key), key
        assert shown
    keys = {key for key, _, _ in cells}
    for index in range(len(stored["rows"])):
        for name in (
            "ttft_s",
            "itl_s",
            "itl_p99_s",
            "peak_bytes",
            "state_bytes",
            "input_cost_per_million",
            "predicted_itl_s",
        ):
            assert f"rows.{index}.{name}" in keys
    for name in ("perplexity", "change", "mean_nll", "median_difference", "largest_difference"):
        assert f"perplexities.0.summary.0.{name}" in keys
    for row in range(2):
        for error in range(3):
            assert f"drifts.0.rows.{row}.errors.{error}.error" in keys
    assert "baseline.changed_by_chance" in keys
    milliseconds = next(shown for key, _, shown in cells if key == "rows.0.ttft_s")
    assert milliseconds == "10.2 ms"
    assert stored["rows"][0]["ttft_s"] == pytest.approx(0.0102)


def test_the_page_needs_nothing_else_and_has_every_figure(values):
    text = page(values)
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for title in (
        "Time to the first token",
        "Time between tokens",
        "Throughput by batch",
        "Peak memory",
        "Time by kind of layer",
        "Perplexity (text)",
        "Drift by decoded tokens",
        "Drift by layer",
        "Drift of the state",
        "there is no device whose memory could be measured",
    ):
        assert title in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    named = {name for pair in re.findall(r'aria-labelledby="([^"]+)"', text) for name in pair.split()}
    assert named <= set(ids)


def test_verdict_cost_and_what_was_not_run(values):
    assert values["verdict"]["status"] == "passed"
    assert any("3 times as fast as PyTorch to the first token" in text for text in values["verdict"]["sentences"])
    row = values["rows"][0]
    assert row["input_cost_per_million"] == pytest.approx(3.6 / 3600 / row["prefill_tokens_per_s"] * 1e6)
    assert {"what": "new: engine at 512 tokens x 1", "reason": "exceeds its max_seq_len 200"} in values["not_run"]
    assert any(item["what"] == "long contexts" for item in values["not_run"])


def test_the_baseline_counts_what_is_beyond_the_spread(values, engine):
    rows = values["baseline"]["rows"]
    assert {row["ttft_s_change"] for row in rows if row["contestant"] == "engine"} == {"faster"}
    assert {row["ttft_s_change"] for row in rows if row["contestant"] == "pytorch"} == {SAME}
    bench = made_bench(engine)
    again = compare(benches=[("a", bench)], baseline=("b", copy.deepcopy(bench)))
    assert {row["itl_s_change"] for row in again["baseline"]["rows"]} == {SAME}
    assert again["baseline"]["changed"] == 0
    found = values["baseline"]
    # Each of the engine's four cells is faster in three numbers; its memory and PyTorch are the same.
    assert (found["numbers"], found["changed"]) == (32, 12)
    assert found["changed_by_chance"] == pytest.approx(32 * 2 / 20)  # three rounds against three
    sentence = next(text for text in values["verdict"]["sentences"] if text.startswith("Against old"))
    assert "of 32 numbers: 12 faster, the rest same within the spread" in sentence
    assert violations(parse(["changed>12"]), values) == []
    assert violations(parse(["changed>11"]), values) == ["changed>11: the worst value is 12"]
    assert violations(parse(["changed>0"]), again) == []


def test_csv_and_markdown(values):
    tables = to_csv(values).split("\n\n")
    rows, texts, drifts = (list(csv.DictReader(io.StringIO(table))) for table in tables)
    assert [float(row["perplexity"]) for row in texts] == [
        row["perplexity"] for row in values["perplexities"][0]["summary"]
    ]
    assert [float(row["error"]) for row in drifts] == [1e-6] * 6
    assert [float(row["itl_s"]) for row in rows] == [row["itl_s"] for row in values["rows"]]
    text = to_markdown(values)
    assert text.startswith("# The engine is right")
    assert "| new | 16 × 1 | engine | 10.2 |" in text
    assert f"| text | engine float32 | {math.exp(2.125 + 1e-6):.6g} | +1.0e-06 |" in text
    assert "| drift | 1000 |" in text


def test_perplexity_and_drift_decide(engine):
    """Good ones pass, wrong ones fail the verdict and their conditions, and what is missing fails a condition on it."""
    conditions = parse(["perplexity_change>1e-3", "state_drift>1e-4", "perplexity>10"])
    good = compare(perplexities=[("t", made_perplexity(engine))], drifts=[("d", made_drift(engine))])
    assert violations(conditions, good) == []
    assert good["verdict"]["status"] == "inconclusive"  # nothing was validated
    assert {"what": "d: 100000 tokens", "reason": "exceeds the engine's max_seq_len 2000"} in good["not_run"]
    wrong = compare(perplexities=[("t", made_perplexity(engine, 0.5))])
    assert wrong["verdict"]["status"] == "failed"
    assert wrong["verdict"]["headline"] == "Do not put this engine into production"
    assert any("predicts the text otherwise than PyTorch" in text for text in wrong["verdict"]["sentences"])
    assert violations(conditions, wrong) == [
        "perplexity_change>1e-3: the worst value is 0.6487",
        "state_drift>1e-4: state_drift was not measured",
        "perplexity>10: the worst value is 13.8",
    ]
    for error, worst in ((1e-3, "0.001"), (None, "inf")):
        drifting = compare(drifts=[("d", made_drift(engine, error))])
        assert drifting["verdict"]["status"] == "failed"
        assert violations(conditions[1:2], drifting) == [f"state_drift>1e-4: the worst value is {worst}"]
        assert "The recurrent states drift: after 10 tokens that of layer 0" in page(drifting)
    assert violations(parse(["disagreement"]), drifting | {"validations": good["drifts"]}) == [
        "disagreement: d did not pass"
    ]


def test_unfinished_measurements_decide_nothing(engine):
    text, run = made_perplexity(engine), made_drift(engine)
    text.finished = run.finished = False
    found = compare(perplexities=[("t", text)], drifts=[("d", run)])
    assert found["verdict"]["status"] == "inconclusive"
    assert [item["what"] for item in found["not_run"]] == [
        "t: the rest of the text",
        "d: 100000 tokens",
        "d: the rest of the decode",
    ]


def test_files_of_another_engine_or_kind_are_refused(engine, files, tmp_path):
    other = made_drift(engine)
    other.engine = other.engine | {"digest": "0"}
    write_json(other.to_dict(), tmp_path / "other.json")
    with pytest.raises(MxcompileError, match="other: was measured on another engine"):
        report([engine], state_drift=[tmp_path / "other.json"])
    with pytest.raises(MxcompileError, match="not a file of `mxcompile bench --perplexity`"):
        report(perplexity=[files / "drift.json"])
    with pytest.raises(MxcompileError, match="name an engine directory"):
        report(bench=[files / "new.json"], text=tmp_path / "t.txt")


def test_a_text_is_measured_now(engine, checkpoint, files, tmp_path):
    (tmp_path / "sea.txt").write_text("The sea was calm, and the lamp in the tower turned.")
    found = report(
        [engine], against=checkpoint, text=tmp_path / "sea.txt", validation=[files / "validation.json"], threads=2
    )
    (item,) = found["perplexities"]
    assert item["name"] == "sea.txt"
    assert item["passed"]
    assert found["verdict"]["status"] == "passed"


def swap_two_experts(model):
    weight = model.layers[1].block_sparse_moe.fc2.weight
    weight.data[[0, 1]] = weight.data[[1, 0]].clone()


def decay_of_the_next_layer(model):
    model.layers[0].self_attn.slopes = decay_slopes(model.config, 1).tolist()


def full_instead_of_half_rotary(model):
    model.frequencies = rotary_frequencies(model.config.head_dim, model.config.rope_theta).tolist()


@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        (swap_two_experts, "layer 1, the experts:.*of experts 0, 1"),
        (decay_of_the_next_layer, "layer 0, the lightning attention:.*decay"),
        (full_instead_of_half_rotary, "layer 1, the softmax attention:.*rotary"),
    ],
)
def test_a_wrong_engine_is_named_by_layer_and_kind(checkpoint, engine, plant, sentence):
    session = PyTorchSession.load(checkpoint, threads=2)
    plant(session.model)
    found = validate(session, checkpoint, ValidationOptions(quick=True, lengths=(20,), threads=2))
    values = compare(validations=[("faulty", found)], benches=[("b", made_bench(engine))])
    assert values["verdict"]["status"] == "failed"
    text = html.unescape(re.sub(r"<[^>]+>", "", page(values)))
    assert "Do not put this engine into production" in text
    assert re.match(f"First difference in {sentence}", text[text.index("First difference") :][:400])


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("ttft_ms>1", True),
        ("ttft_ms > 1000", False),
        ("decode_speedup<2", False),
        ("decode_speedup<4", True),
        ("slowdown>1.1", False),
        ("logit_difference>1", False),
        ("disagreement", False),
        ("incomplete", True),
    ],
)
def test_conditions(engine, checkpoint, files, condition, holds):
    inputs = {"bench": [files / "new.json"], "validation": [files / "validation.json"], "baseline": files / "old.json"}
    found = report([engine], against=checkpoint, fail_on=[condition], **inputs)
    assert (found["verdict"]["status"] == "failed") == holds
    assert bool(found["failed_conditions"]) == holds


def test_a_condition_on_what_was_not_measured_fails(engine, files):
    found = report(validation=[files / "validation.json"], fail_on=["peak_gib>100"])
    assert found["failed_conditions"] == ["peak_gib>100: peak_gib was not measured"]
    with pytest.raises(MxcompileError, match="is not understood; known: disagreement"):
        report(validation=[files / "validation.json"], fail_on=["speed>1"])


def test_files_that_do_not_belong_together_are_refused(engine, checkpoint, files, tmp_path):
    create_checkpoint("tiny", tmp_path / "other", seed=99)
    with pytest.raises(MxcompileError, match="another checkpoint"):
        report([engine], against=tmp_path / "other", bench=[files / "new.json"])
    with pytest.raises(MxcompileError, match="validation: is of another checkpoint"):
        report(against=tmp_path / "other", validation=[files / "validation.json"])
    moved = json.loads((files / "new.json").read_text())
    moved["engine"]["digest"] = "0" * 64
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    with pytest.raises(MxcompileError, match="was measured on another engine"):
        report([engine], bench=[tmp_path / "moved.json"])
    moved["schema_version"] = 7
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    with pytest.raises(MxcompileError, match="schema version 7, this mxcompile reads 2"):
        report(bench=[tmp_path / "moved.json"])
    with pytest.raises(MxcompileError, match="not a benchmark"):
        report(bench=[files / "validation.json"])
    with pytest.raises(MxcompileError, match="nothing to report on"):
        report()


def test_an_interrupted_benchmark_is_shown_as_such(engine, tmp_path):
    bench = made_bench(engine)
    bench.finished = False
    bench.environment["load_average_before"] = [5.0, 5.0, 5.0]
    write_json(bench.to_dict(), tmp_path / "b.json")
    found = report(bench=[tmp_path / "b.json"])
    assert found["verdict"]["status"] == "inconclusive"
    assert any("interrupted; go on with" in item["reason"] for item in found["not_run"])
    assert any("machine was busy" in text for text in found["verdict"]["sentences"])


def test_the_command(mxcompile, engine, files, tmp_path):
    inputs = ("--bench", files / "new.json", "--validation", files / "validation.json")
    outputs = (
        "-o",
        tmp_path / "r.html",
        "--json",
        tmp_path / "r.json",
        "--csv",
        tmp_path / "r.csv",
        "--markdown",
        tmp_path / "r.md",
    )
    done = mxcompile("report", engine, *inputs, *outputs)
    assert done.returncode == 0, done.stderr
    assert "The engine is right" in done.stdout
    assert all((tmp_path / f"r.{kind}").stat().st_size for kind in ("html", "json", "csv", "md"))
    gated = mxcompile("report", engine, *inputs, "--fail-on", "ttft_ms>1")
    assert gated.returncode == 1
    assert "ttft_ms>1: the worst value is" in gated.stdout
    refused = mxcompile("report", "--bench", tmp_path / "none.json")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
