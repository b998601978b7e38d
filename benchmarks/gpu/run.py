"""Tests and benchmarks of the CUDA kernels on the GPU at hand, one command each, ten minutes each at most.

    python3 benchmarks/gpu/run.py test     GPU tests group by group, then the small ones under compute-sanitizer
    python3 benchmarks/gpu/run.py bench    every *_bench.py of this folder

Results are written as they come (gpu-test.json, gpu-lightning.json, gpu-moe.json, with logs beside them) into
benchmarks/results, or the folder given with --results. A kernel that crashes or hangs costs its own test or case alone
(supervise.py). --library takes a library built elsewhere from the same sources (`python -m plugins.build --arch 90a
--no-tensorrt --build-dir DIR`); without it the kernels are built here first, which needs nvcc and CMake.

Needs pytest, hypothesis, numpy, ml_dtypes and a PyTorch with CUDA; TensorRT is not needed. Exit code 0; 1 for a failed test,
benchmark or missed goal; 2 for wrong arguments; 3 where there is no GPU, compiler or library. docs/gpu-runs.md says more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZED = "memory_clean"  # tests whose name has this are small enough for compute-sanitizer
SECONDS = 560.0  # of one command; a little is left for its end

sys.path[:0] = [str(ROOT), str(HERE)]

from pytest_progress import PROGRESS_VARIABLE  # noqa: E402
from supervise import supervise  # noqa: E402

from plugins import catalog  # noqa: E402
from plugins.build import BuildResult, build, default_build_dir, load_result, sources_digest  # noqa: E402
from plugins.errors import PluginsError  # noqa: E402

# What is tested, the most trusted first: (name, file, -k, most seconds). What has never run comes last.
GROUPS = (
    ("lightning", "test_lightning_gpu.py", "not sm90 and not memory_clean", 150.0),
    ("moe", "test_moe_gpu.py", "not sm90 and not memory_clean", 120.0),
    ("attention", "test_attention_gpu.py", "not memory_clean", 60.0),
    ("lightning sm90", "test_lightning_gpu.py", "sm90 and not apart and not memory_clean", 150.0),
    ("lightning sm90 apart", "test_lightning_gpu.py", "apart and not memory_clean", 60.0),
    ("moe sm90", "test_moe_gpu.py", "sm90 and not memory_clean", 90.0),
)
STALL_SECONDS = 75.0  # longer than any test or case and a process' start
BENCH_SECONDS = {"lightning": 240.0, "moe": 300.0}  # most for each; what one leaves goes to the next


def gpu_facts() -> dict[str, str]:
    """Name, compute capability, driver and memory of the first GPU, from nvidia-smi."""
    fields = ("name", "compute_cap", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PluginsError(f"no NVIDIA GPU found: nvidia-smi: {error}") from error
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=True))


def versions(result: BuildResult) -> dict[str, str | None]:
    """Of what the numbers depend on."""
    code = (
        "import json, torch; out = {'torch': torch.__version__, 'cuda': torch.version.cuda}\n"
        "for name in ('triton', 'fla'):\n"
        "    try:\n        out[name] = __import__(name).__version__\n    except Exception: pass\n"
        "print(json.dumps(out))"
    )
    found: dict[str, str | None] = {}
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        pass  # nothing to end a run for
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git there
        commit = ""
    return {
        **found,
        "python": platform.python_version(),
        "nvcc": result.nvcc_version,
        "sources": result.sources[:16],
        "commit": commit or None,
    }


def find_library(facts: dict[str, str], given: Path | None) -> tuple[BuildResult, Path]:
    """The kernels for this GPU and their folder: those in `given`, which must be of these sources, or built now."""
    arch = catalog.architecture_for(int(facts["compute_cap"].replace(".", "")))
    if arch is None:
        raise PluginsError(
            f"{facts['name']} has compute capability {facts['compute_cap']}; no kernels are built for it"
        )
    folder = given or default_build_dir()
    if given is None:
        result = build([arch], folder, tensorrt=False)
    else:
        found = load_result(folder)
        again = f"run `python -m plugins.build --arch {arch} --no-tensorrt --build-dir {folder}` again"
        if found is None:
            raise PluginsError(f"{folder} holds no finished build; {again}")
        if found.sources != sources_digest(found.architectures):
            raise PluginsError(f"the library in {folder} was built from other sources; {again}")
        if arch not in found.architectures:
            raise PluginsError(f"the library in {folder} is for {', '.join(found.architectures)}; {again}")
        result = found
    print(f"{facts['name']}: {len(result.usage)} kernels for {arch}, {'unchanged' if result.skipped else 'built'}")
    return result, folder


def environment(library: Path) -> dict[str, str]:
    """For child processes: they import the packages, the helpers beside the tests and this folder's."""
    paths = [str(ROOT), str(ROOT / "tests" / "plugins"), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "MXCOMPILE_TEST_LIBRARY": str(library.absolute()),
    }


def write(target: Path, report: dict[str, Any]) -> None:
    """Replaces the file in one step."""
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(target)


def tail(path: Path, lines: int = 15) -> list[str]:
    """The end of a log."""
    return path.read_text(errors="replace").splitlines()[-lines:] if path.is_file() else []


def run_group(
    name: str, arguments: list[str], log_path: Path, seconds: float, stall: float, env: dict[str, str]
) -> dict[str, Any]:
    """Runs pytest with `arguments`, in as many processes as crashes make necessary; counts and what went wrong."""
    progress = log_path.with_suffix(".jsonl")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_progress", "--tb=short", "-q"]

    def command_for(done: set[str]) -> list[str]:
        return [*command, *arguments, *(word for test in sorted(done) for word in ("--deselect", test))]

    with log_path.open("ab") as log:
        log.write(f"\n==== {name}\n".encode())
        log.flush()
        ended = supervise(
            command_for,
            progress,
            seconds=seconds,
            stall=stall,
            log=log,
            good_codes=(0, 1, 5),
            env={**env, PROGRESS_VARIABLE: str(progress)},
            cwd=ROOT,
        )
    progress.unlink(missing_ok=True)
    outcomes = [record["outcome"] for record in ended.records.values()]
    wrong = {test: record for test, record in ended.records.items() if record["outcome"] not in ("passed", "skipped")}
    return {
        "passed": outcomes.count("passed"),
        "skipped": outcomes.count("skipped"),
        "wrong": wrong,
        "problem": ended.problem,
        "seconds": ended.seconds,
    }


def run_tests(about: dict[str, Any], library: Path, results: Path, seconds: float) -> int:
    """1 where anything failed, else 0."""
    env = environment(library)
    log_path, target = results / "gpu-test.log", results / "gpu-test.json"
    log_path.unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    report: dict[str, Any] = {**about, "groups": {}, "sanitizer": {}}
    for name, file, chosen, most in GROUPS:
        left = deadline - time.monotonic()
        if left < 15:
            report["groups"][name] = {"wrong": {}, "problem": "not run: out of time"}
        else:
            arguments = ["-m", "gpu", f"tests/plugins/{file}", "-k", chosen]
            report["groups"][name] = run_group(name, arguments, log_path, min(most, left), STALL_SECONDS, env)
        write(target, report)
        print(f"{name}: {summary(report['groups'][name])}", flush=True)
    sanitizer = shutil.which("compute-sanitizer")
    tools = ("memcheck", "racecheck") if sanitizer else ()
    if not sanitizer:
        print("compute-sanitizer is not installed: memory errors were not looked for")
    for tool in tools:
        for name, chosen in (("portable", f"{SANITIZED} and not sm90"), ("sm90", f"{SANITIZED} and sm90")):
            left = deadline - time.monotonic()
            report["sanitizer"][f"{tool} {name}"] = (
                sanitize([str(sanitizer), "--tool", tool], chosen, log_path, min(100.0, left), env)
                if left > 20
                else "not run: out of time"
            )
            write(target, report)
            print(f"{tool} {name}: {report['sanitizer'][f'{tool} {name}']}", flush=True)
    clean = all(not group["wrong"] and not group["problem"] for group in report["groups"].values())
    if not any(group.get("passed") for group in report["groups"].values()):
        print(f"no test ran; see {log_path}")
        clean = False
    return 0 if clean and all(value == "clean" for value in report["sanitizer"].values()) else 1


def summary(group: dict[str, Any]) -> str:
    """One line for a group of tests."""
    said = f"{group.get('passed', 0)} passed, {group.get('skipped', 0)} skipped, {len(group['wrong'])} wrong"
    names = [f"\n    {test}: {record['outcome']}" for test, record in list(group["wrong"].items())[:12]]
    return f"{said}{'; ' + group['problem'] if group['problem'] else ''}{''.join(names)}"


def sanitize(tool: list[str], chosen: str, log_path: Path, seconds: float, env: dict[str, str]) -> str:
    """'clean', or what compute-sanitizer said."""
    command = [*tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    with log_path.open("ab") as log:
        log.write(f"\n==== {' '.join(tool)} -k {chosen}\n".encode())
        log.flush()
        child = subprocess.Popen(
            [*command, "-q", "tests/plugins", "-k", chosen],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            return f"not done after {seconds:.0f} s"
    return {0: "clean", 5: "no such test"}.get(code, f"code {code}; see {log_path.name}")


def run_benchmarks(about: dict[str, Any], library: Path, results: Path, only: list[str], seconds: float) -> int:
    """Runs them one after the other; 1 where one failed or missed a goal."""
    scripts = {script.stem.removesuffix("_bench"): script for script in sorted(HERE.glob("*_bench.py"))}
    chosen = [stem for stem in scripts if not only or stem in only]
    if not chosen:
        raise PluginsError(f"no benchmark of that name; there are {', '.join(scripts) or 'none'}")
    deadline = time.monotonic() + seconds
    failed = []
    for stem in chosen:
        left = deadline - time.monotonic()
        most = min(left, BENCH_SECONDS.get(stem, left)) if stem != chosen[-1] else left
        output, log_path, target = results / f".{stem}.json", results / f"gpu-{stem}.log", results / f"gpu-{stem}.json"
        output.unlink(missing_ok=True)
        started = time.monotonic()
        command = [sys.executable, str(scripts[stem]), "--out", str(output), "--library-dir", str(library)]
        command += ["--seconds", f"{most - 10:.0f}", "--log", str(log_path)]
        try:
            # The script watches over its own children; this limit is for the script itself.
            code = subprocess.run(
                command, cwd=ROOT, env=environment(library), check=False, timeout=most + 20
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        taken = round(time.monotonic() - started, 1)
        if code != 0 or not output.is_file():
            failed.append(stem)
        found = json.loads(output.read_text()) if output.is_file() else {"problem": "no result", "log": tail(log_path)}
        output.unlink(missing_ok=True)
        write(target, {**about, "benchmark": stem, "seconds": taken, "exit_code": code, **found})
        print(f"{stem}: code {code} after {taken} s, {target.name}", flush=True)
    return 1 if failed else 0


def main() -> int:
    """Exit code 0; 1 for a failed test or missed goal; 3 where there is no GPU, compiler or library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["test", "bench"])
    parser.add_argument("--only", action="append", default=[], metavar="STEM", help="benchmark to run; may be repeated")
    parser.add_argument("--library", type=Path, metavar="DIR", help="build folder of a finished library")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything (%(default).0f)")
    options = parser.parse_args()
    begun = time.monotonic()
    try:
        facts = gpu_facts()
        result, folder = find_library(facts, options.library)
        options.results.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).isoformat()
        about = {"hardware": facts, "versions": versions(result), "date": date}
        left = options.seconds - (time.monotonic() - begun)
        if options.what == "test":
            return run_tests(about, folder, options.results, left)
        return run_benchmarks(about, folder, options.results, options.only, left)
    except PluginsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
