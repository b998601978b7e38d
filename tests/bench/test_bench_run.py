"""`bench` on a tiny engine: what it records, what it refuses, and how it goes on after an interruption. No test asserts on a time."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mxcompile.bench import rates
from mxcompile.bench.contestants import ContestantError, ContestantProcess, ContestantTimeout
from mxcompile.bench.entrants import Entrants
from mxcompile.bench.options import BenchOptions
from mxcompile.bench.results import BenchReport, read_json
from mxcompile.bench.run import bench
from mxcompile.bench.statistics import spread
from mxcompile.checkpoints import create_checkpoint
from mxcompile.cli.bench import command
from mxcompile.errors import MxcompileError

OPTIONS = {
    "prompt_lengths": (8, 24, 300),
    "batch_sizes": (1, 2),
    "new_tokens": 3,
    "repeats": 2,
    "warmup": 0,
    "threads": 2,
    "layer_times": False,
    "passes": 1,
}


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch):
    """The machine's rates from small arrays: enough for every path."""
    ask = ContestantProcess.ask

    def small(self, task, timeout_s):
        if task.get("do") == "rates":
            task = task | {"sizes": {"copy_bytes": 1 << 20, "size": 64, "tries": 1}}
        return ask(self, task, timeout_s)

    monkeypatch.setattr(ContestantProcess, "ask", small)


@pytest.fixture(scope="module")
def measured(engine, tmp_path_factory):
    """All three contestants, with times by layer: (report, file)."""
    file = tmp_path_factory.mktemp("bench") / "b.json"
    options = BenchOptions(**OPTIONS | {"backends": ("engine", "pytorch", "transformers"), "layer_times": True})
    return bench(engine, options, json_file=file), file


def test_every_contestant_is_measured_at_every_cell(measured):
    report, file = measured
    assert report.finished
    assert [item.left_out for item in report.contestants] == ["", "", ""]
    keys = {(cell.contestant, cell.prompt_length, cell.batch_size) for cell in report.cells}
    assert keys == {(n, length, b) for n in ("engine", "pytorch", "transformers") for length in (8, 24) for b in (1, 2)}
    for cell in report.cells:
        assert len(cell.repeats) == 2
        assert all(len(item["steps_s"]) == 3 for item in cell.repeats)
        step = cell.summary["itl_s"]
        assert 0 < step["median"] <= step["p90"] <= step["p99"] <= step["max"]
        assert cell.summary["peak_bytes"] > cell.summary["state_bytes"] > 0
        assert cell.bound is not None
    assert BenchReport.from_dict(json.loads(file.read_text())) == report
    assert report.environment["threads"] == 2
    assert "rotary" in report.contestants[2].notes[0]


def test_cells_beyond_the_capacity_are_named_with_the_reason(measured):
    reasons = {item.contestant: item.reason for item in measured[0].not_run if item.prompt_length == 300}
    assert reasons["engine"] == "300 and 3 new tokens exceed its max_seq_len 200"
    assert "nothing to compare" in reasons["pytorch"]


def test_times_by_kind_of_layer(measured):
    (times,) = measured[0].layer_times
    for seconds in (times.prefill_s, times.decode_s):
        assert set(seconds) == {"lightning", "softmax", "experts", "rest"}
        assert all(value > 0 for value in seconds.values())


def test_an_interrupted_run_goes_on_where_it_stopped(engine, tmp_path, monkeypatch):
    file = tmp_path / "b.json"
    options = BenchOptions(**OPTIONS | {"passes": 2})
    sample = Entrants.sample

    def interrupted(self, name, length, batch, number):
        if (length, batch) == (24, 1):
            raise KeyboardInterrupt
        return sample(self, name, length, batch, number)

    monkeypatch.setattr(Entrants, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(engine, options, json_file=file)
    monkeypatch.setattr(Entrants, "sample", sample)
    stopped = read_json(file)
    assert not stopped.finished
    assert stopped.interruptions == 1
    assert [(c.prompt_length, c.batch_size) for c in stopped.cells] == [(8, 1)]
    with pytest.raises(MxcompileError, match="unfinished run of 1 cells; go on with --resume"):
        bench(engine, options, json_file=file)
    with pytest.raises(MxcompileError, match="its new tokens were 3, not 4"):
        bench(engine, BenchOptions(**OPTIONS | {"new_tokens": 4, "passes": 2}), json_file=file, resume=True)
    done = bench(engine, options, json_file=file, resume=True)
    assert done.finished
    assert done.cells[0] == read_json(file).cells[0]
    assert done.cells[0].repeats[:1] == stopped.cells[0].repeats
    assert all([item["pass"] for item in cell.repeats] == [0, 1] for cell in done.cells)
    assert len(done.cells) == 4
    assert [c.name for c in done.contestants] == ["engine"]


def test_rounds_are_spread_over_passes_in_new_processes(engine, monkeypatch):
    started, start = [], ContestantProcess.start

    def counted(self, *arguments):
        started.append(self.setup["backend"])
        return start(self, *arguments)

    monkeypatch.setattr(ContestantProcess, "start", counted)
    said = []
    options = BenchOptions(**OPTIONS | {"repeats": 3, "passes": 2, "prompt_lengths": (8, 300), "batch_sizes": (1,)})
    report = bench(engine, options, announce=said.append)
    assert started.count("engine") == 2
    (cell,) = report.cells
    assert [item["pass"] for item in cell.repeats] == [0, 0, 1]
    first, second = (spread([item["ttft_s"] for item in cell.repeats if item["pass"] == n])["median"] for n in (0, 1))
    assert cell.summary["ttft_s"]["interval"] == {
        "low": min(first, second), "high": max(first, second), "level": 0.5, "rank": 1, "passes": 2,
    }  # fmt: skip
    assert len(said) == 1
    assert said[0].startswith("1 cells to measure (1 sizes cannot run), passes: 2: about ")
    assert cell.summary["device_peak_bytes"] is None  # a CPU is no device
    assert [item.reason for item in report.not_run] == ["300 and 3 new tokens exceed its max_seq_len 200"]


def test_a_cell_that_the_machine_cannot_finish_in_time_is_not_begun(engine, monkeypatch):
    monkeypatch.setattr(rates, "bound", lambda *a: {"prefill_s": 100.0, "decode_s": 1.0})
    report = bench(engine, BenchOptions(**OPTIONS | {"limit_s": 60.0, "batch_sizes": (1,), "prompt_lengths": (8,)}))
    assert not report.cells
    assert "takes at least 2 min at this machine's rates, more than 60 s" in report.reason("engine", 8, 1)


def test_defaults_and_bad_options():
    options = BenchOptions()
    assert (options.prompt_lengths, options.batch_sizes, options.new_tokens) == (
        (128, 1024, 8192, 65536),
        (1, 4, 16),
        64,
    )
    assert options.passes == options.repeats
    assert [BenchOptions(repeats=7, passes=3).rounds(n) for n in range(3)] == [3, 2, 2]
    with pytest.raises(MxcompileError, match="2 rounds cannot be spread over 3 passes"):
        BenchOptions(repeats=2, passes=3)


def test_an_execution_error_is_retried_once_and_reported(engine, monkeypatch):
    ask, failed = ContestantProcess.ask, []

    def flaky(self, task, timeout_s):
        if task.get("prompt_length") == 8 and not failed:
            failed.append(1)
            raise ContestantError("a passing fault")
        if task.get("prompt_length") == 24:
            raise ContestantError("a lasting fault")
        return ask(self, task, timeout_s)

    monkeypatch.setattr(ContestantProcess, "ask", flaky)
    report = bench(engine, BenchOptions(**OPTIONS | {"batch_sizes": (1,), "prompt_lengths": (8, 24)}))
    assert [(f.prompt_length, f.error, f.retried) for f in report.failures] == [
        (8, "a passing fault", True),
        (24, "a lasting fault", False),
    ]
    assert [cell.prompt_length for cell in report.cells] == [8]
    assert report.reason("engine", 24, 1) == "failed twice: a lasting fault"


def test_a_round_over_the_limit_ends_it_and_longer_ones(engine, monkeypatch):
    ask = ContestantProcess.ask

    def slow(self, task, timeout_s):
        if task.get("prompt_length") == 8:
            self.stop()
            raise ContestantTimeout("took more than 1 s")
        return ask(self, task, timeout_s)

    monkeypatch.setattr(ContestantProcess, "ask", slow)
    report = bench(engine, BenchOptions(**OPTIONS | {"batch_sizes": (1,), "prompt_lengths": (8, 24)}))
    assert not report.cells
    assert report.reason("engine", 8, 1) == "one round took more than 1 s"
    assert "already took more than" in report.reason("engine", 24, 1)


def test_a_process_that_dies_says_how(engine):
    setup = {"backend": "engine", "engine": str(engine), "checkpoint": None, "moved": False, "threads": 1}
    with ContestantProcess(setup) as process:
        ready = process.start()
        assert ready["max_seq_len"] == 200
        process._process.kill()
        with pytest.raises(ContestantError, match="process"):
            process.ask({"do": "cell", "prompt_length": 8, "batch_size": 1, "new_tokens": 1, "seed": 0}, 30)
        assert process.start()["max_batch_size"] == 2


def test_the_engine_of_another_checkpoint_is_refused(engine, tmp_path):
    create_checkpoint("tiny", tmp_path / "other", seed=99)
    with pytest.raises(MxcompileError, match="built from another checkpoint"):
        bench(engine, BenchOptions(**OPTIONS), against=tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--needle", "--resume"), "--needle runs as a whole"),
        (("--needle", "--state-drift", "10"), "separate runs; give one of them"),
        (("--haystack", "t.txt"), "--haystack belongs to --needle"),
        (("--context", "10"), "--context belongs to --perplexity"),
        (("--passes", "0"), "--passes"),
        (("--state-drift", "0"), "not a number of tokens"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, arguments, message):
    done = CliRunner().invoke(command, [str(tmp_path), *arguments])
    assert done.exit_code != 0
    assert message in (done.output + str(done.exception))


def test_the_command(mxcompile, engine, tmp_path):
    done = mxcompile(
        "bench", engine, "--prompt-lengths", "8", "--batch-sizes", 1, "--new-tokens", 2, "--repeats", 1, "--threads", 2,
        "--no-layer-times", "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 x 1" in done.stdout
    assert read_json(tmp_path / "b.json").finished
    for arguments, text in (
        (("--prompt-lengths", "8,x"), "not a number of tokens"),
        (("--resume",), "name it with --json FILE"),
        (("--needle", "--haystack", tmp_path / "none.txt"), "none.txt"),
    ):
        refused = mxcompile("bench", engine, *arguments)
        assert refused.returncode == 2, refused.stderr
        assert text in refused.stderr
        assert refused.stderr.count("\n") == 1
