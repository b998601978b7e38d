"""The command line as a whole: what it imports, how it ends, and the options it takes from files."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys

import click
import pytest
from cli_process import environment

from engines.errors import EngineError
from mxcompile.cli.errors import describe
from mxcompile.cli.main import VERBS, cli
from mxcompile.errors import EnvironmentProblem, MxcompileError


def test_no_help_page_imports_anything_heavy():
    script = """
import sys
from mxcompile.cli.main import VERBS, cli
pages = [["--help"], *([verb, "--help"] for verb in VERBS)]
pages += [["checkpoint", verb, "--help"] for verb in ("create", "verify")]
pages += [["plugins", verb, "--help"] for verb in ("build", "list")]
for page in pages:
    cli.main(page, prog_name="mxcompile", standalone_mode=False)
heavy = {"numpy", "torch", "onnx", "onnx_ir", "onnxruntime", "rich", "tokenizers", "transformers", "ml_dtypes"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True, env=environment()
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stdout.count("Usage: mxcompile") == 1 + len(VERBS) + 4


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_says_what_each_verb_says(verb):
    context = click.Context(cli)
    assert cli.get_command(context, verb).get_short_help_str(200).rstrip(".") == VERBS[verb].rstrip(".")


def test_import_of_the_package_is_free_and_names_resolve():
    script = (
        "import sys, mxcompile; print(sorted({'numpy', 'click', 'torch'} & set(sys.modules)), mxcompile.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True, env=environment()
    )
    assert done.stdout.startswith("[] 0.")
    import mxcompile as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compile'"):
        _ = package.compile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["checkpoint"], "give a command (see: mxcompile checkpoint --help)"),
        (["run", "folder", "--promt", "x"], "No such option '--promt'"),
        (["run", "folder"], "give --prompt, --prompt-file or --tokens, or --chat"),
        (["run", "folder", "--prompt", "x", "--tokens", "1"], "give one of --prompt, --tokens"),
        (["run", "folder", "--tokens", "1,x"], "'1,x' is not a list of token ids"),
        (["run", "folder", "--chat"], "--chat without a prompt needs a terminal"),
        (["run", "folder", "--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["run", "folder", "--prompt-file", "absent.txt"], "absent.txt: No such file"),
        (["run", "folder", "--prompt", "x", "--top-p", "0"], "Invalid value for '--top-p'"),
        (["run", "folder", "--prompt-file", "/dev/zero"], "/dev/zero: is larger than 256 MiB"),
        (["run", "absent", "--prompt", "x"], "absent: no such engine directory"),
        (["inspect", os.fsdecode(b"x\xff")], "'x\\udcff' is not UTF-8; rename it"),
        (["build", "absent", "-o", "out"], "checkpoint absent: does not exist"),
        (["build", "absent", "-o", ""], "Invalid value for '-o' / '--output': an empty path"),
        (["serve", "absent", "--triton-venv", "venv"], "absent: no such engine directory"),
        (["build", "absent"], "Missing option '-o' / '--output'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(mxcompile, arguments, message, tmp_path):
    done = mxcompile(*arguments, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_the_help_is_shown(mxcompile):
    done = mxcompile()
    assert (done.returncode, done.stdout) == (0, mxcompile("--help").stdout)


def test_a_shell_can_complete_verbs(mxcompile):
    asked = {"_MXCOMPILE_COMPLETE": "bash_complete", "COMP_WORDS": "mxcompile va", "COMP_CWORD": "1"}
    assert mxcompile(env=environment(**asked)).stdout == "plain,validate\n"


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(mxcompile, how, tmp_path):
    arguments = ["run", "absent", "--prompt", "x"]
    if how == "option":
        done = mxcompile(*arguments, "--debug", cwd=tmp_path)
    else:
        done = mxcompile(*arguments, cwd=tmp_path, env=environment(MXCOMPILE_DEBUG="1"))
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "absent: no such engine directory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MxcompileError("wrong"), 2, "wrong"),
        (EnvironmentProblem("no room"), 3, "no room"),
        (EngineError("differs", exit_code=1), 1, "differs"),
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx"), 3, "x.onnx: the disk is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 3, "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: Permission denied"),
        (MemoryError(), 3, "out of memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3, "pip install 'mxcompile[build]'"),
        (ModuleNotFoundError("No module named 'x'", name="onnx.helper"), 3, "this needs onnx.helper"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
        (UnicodeEncodeError("utf-8", "x\udcff", 1, 2, "surrogates not allowed"), 2, "a name is not UTF-8"),
        (click.UsageError("bad"), 2, "bad"),
        (SystemExit(143), 143, ""),
        (ZeroDivisionError("division"), 70, "internal error: ZeroDivisionError: division"),
    ],
)
def test_every_end_has_its_exit_code(error, code, message):
    found, line = describe(error)
    assert found == code
    assert message in line


@pytest.mark.parametrize(
    ("signal", "code", "message"), [(KeyboardInterrupt(), 130, "interrupted"), (SystemExit(143), 143, "")]
)
def test_a_signal_that_a_starting_library_makes_an_error_of(signal, code, message):
    """As extension modules written with pybind11 do, torch among them."""
    error = ImportError("initialization failed")
    error.__cause__ = signal
    assert describe(error) == (code, message)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--json"], ["plugins", "list"]])
def test_a_reader_that_goes_away_is_not_an_error_message(arguments):
    command = [sys.executable, "-m", "mxcompile", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment(), **pipes)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(300)) == ("", 141)
    process.stderr.close()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", [["plugins", "list"], ["checkpoint", "verify"]])
def test_a_closed_stream_is_nothing_to_fail_for(arguments, closed, tiny_checkpoint):
    """Whose number would otherwise go to a file that is opened later."""
    names = [str(tiny_checkpoint)] if arguments[-1] == "verify" else []
    words = shlex.join([sys.executable, "-m", "mxcompile", *arguments, *names])
    shell = ["sh", "-c", f"{words} {closed}"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_nothing_of_a_run_is_told_to_the_maker_of_the_runtime(tmp_path):
    """ONNX Runtime would leave an identifier of the machine in the home folder. It does not where it takes a variable for that of a CI."""
    script = "import engines, onnxruntime; print(onnxruntime.get_available_providers())"
    kept = {name: value for name, value in environment().items() if name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}
    for start in (["-c", script], ["-m", "mxcompile", "doctor"]):
        command = [sys.executable, *start]
        subprocess.run(command, capture_output=True, timeout=300, check=True, env=kept | {"HOME": str(tmp_path)})
        assert list(tmp_path.iterdir()) == []


def test_doctor_reports_this_machine(mxcompile):
    done = mxcompile("doctor", "--json")
    machine = json.loads(done.stdout)
    assert done.returncode == 0
    assert machine["python"] == sys.version.split()[0]
    assert machine["cores"] >= 1
    assert machine["disk_free"] > 0
    targets = {target["target"]: target for target in machine["targets"]}
    assert targets["onnxruntime"]["can_run"] is True
    assert targets["onnxruntime"]["run_missing"] == []
    if not machine["gpus"]:
        assert targets["tensorrt"]["can_run"] is False
    table = mxcompile("doctor")
    assert "CPUExecutionProvider" in table.stdout


def test_doctor_names_what_is_missing(monkeypatch):
    from mxcompile import machine

    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: None if name in ("torch", "onnxscript") else real(name))
    status = next(target for target in machine.examine().targets if target.target == "onnxruntime")
    assert (status.build_missing, status.can_build, status.can_run) == (["torch", "onnxscript"], False, True)


class Recorded:
    """Stands for `mxcompile.building.build` and keeps what it was called with."""

    def __init__(self, monkeypatch):
        from mxcompile import building

        monkeypatch.setattr(building, "build", self)

    def __call__(self, checkpoint, output, **options):
        self.options = options | {"output": str(output)}
        raise MxcompileError("recorded")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("build.toml", 'max-seq-len = 100\nmax_batch_size = 3\nforce = true\ndtype = "bfloat16"\n'),
        ("build.json", '{"max_seq_len": 100, "max-batch-size": 3, "force": true, "dtype": "bfloat16"}'),
    ],
)
def test_options_come_from_a_file_and_the_command_line_wins(monkeypatch, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    recorded = Recorded(monkeypatch)
    arguments = ["build", "c", "-o", "out", "--config", str(tmp_path / name), "--max-seq-len", "200"]
    with pytest.raises(MxcompileError, match="recorded"):
        cli.main(arguments, standalone_mode=False)
    found = {key: recorded.options[key] for key in ("max_seq_len", "max_batch_size", "force", "dtype", "target")}
    assert found == {
        "max_seq_len": 200,
        "max_batch_size": 3,
        "force": True,
        "dtype": "bfloat16",
        "target": "onnxruntime",
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "max_seq_length = 3", "unknown key 'max_seq_length'; known: .*max_seq_len"),
        ("a.toml", "config = 'x'", "unknown key 'config'"),
        ("a.toml", "max_seq_len = 2.5", "max_seq_len must be a whole number, not 2.5"),
        ("a.toml", "max_seq_len = true", "max_seq_len must be a whole number"),
        ("a.toml", "force = 'no'", "force must be true or false"),
        ("a.toml", "dtype = 3", "dtype must be a string"),
        ("a.toml", "= 3", "not valid TOML"),
        ("a.json", "[1]", "must hold one JSON object"),
        ("a.json", "{", "not valid JSON"),
        ("a.toml", None, "No such file"),
    ],
)
def test_a_bad_file_of_options_is_refused_by_name(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(MxcompileError, match=message) as caught:
        cli.main(["build", "c", "-o", "out", "--config", str(path)], standalone_mode=False)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_values_from_a_file_obey_the_option_s_range(tmp_path):
    (tmp_path / "a.toml").write_text("max_seq_len = 0")
    with pytest.raises(click.BadParameter, match="0 is not in the range"):
        cli.main(["build", "c", "-o", "out", "--config", str(tmp_path / "a.toml")], standalone_mode=False)


def test_bars_show_stages_of_known_and_unknown_size(monkeypatch, capsys):
    from mxcompile.cli.progress_bars import progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(False) as shown:
        with shown.stage("trace"):
            pass
        with shown.stage("bind weights", 200) as stage:
            stage.advance(150)
            stage.advance(50)
    out, err = capsys.readouterr()
    assert out == ""
    assert "trace" in err
    assert "bind weights" in err
    assert "100%" in err


def test_stages_add_up_in_the_clock():
    from mxcompile.progress import SilentProgress, StageClock

    clock = StageClock(SilentProgress())
    for name in ("read", "trace", "read"):
        with clock.stage(name, 3) as stage:
            stage.advance()
    assert list(clock.seconds) == ["read", "trace"]
    assert all(seconds >= 0 for seconds in clock.seconds.values())
