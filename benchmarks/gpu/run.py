"""Tests and benchmarks of the CUDA kernels on the GPU at hand, one command each.

    python3 benchmarks/gpu/run.py test     build, GPU tests, then a few of them under compute-sanitizer
    python3 benchmarks/gpu/run.py bench    build, every *_bench.py of this folder; results into benchmarks/results/

Needs nvcc, CMake, pytest, hypothesis, numpy and a PyTorch with CUDA; TensorRT is not needed. Each benchmark is a program of
its own that takes `--out FILE` and writes a JSON object; hardware, versions and date are added here. Goals it misses end it
with code 1, and so end this one, after all have run.
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
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results"
SANITIZED = "memory_clean"  # tests whose name has this are small enough for compute-sanitizer

sys.path.insert(0, str(ROOT))

from plugins import catalog  # noqa: E402
from plugins.build import BuildResult, build, default_build_dir  # noqa: E402
from plugins.errors import PluginsError  # noqa: E402


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
        "try:\n    import triton; out['triton'] = triton.__version__\nexcept ImportError: pass\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        **(json.loads(done.stdout) if done.returncode == 0 else {}),
        "python": platform.python_version(),
        "nvcc": result.nvcc_version,
        "sources": result.digest[:16],
        "commit": commit.stdout.strip() or None,
    }


def build_here(facts: dict[str, str]) -> BuildResult:
    """The kernels for this GPU, without TensorRT, in the default build folder."""
    capability = int(facts["compute_cap"].replace(".", ""))
    arch = catalog.architecture_for(capability)
    if arch is None:
        raise PluginsError(
            f"{facts['name']} has compute capability {facts['compute_cap']}; no kernels are built for it"
        )
    result = build([arch], default_build_dir(), tensorrt=False)
    print(f"{facts['name']}: {len(result.usage)} kernels for {arch}, {'unchanged' if result.skipped else 'built'}")
    return result


def environment() -> dict[str, str]:
    """For child processes: they import the packages and the helpers beside the tests."""
    paths = [str(ROOT), str(ROOT / "tests" / "plugins"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_tests(facts: dict[str, str]) -> int:
    """Exit code of the first thing that failed, else 0."""
    arch = catalog.architecture_for(int(facts["compute_cap"].replace(".", "")))
    child = {**environment(), "MXCOMPILE_TEST_ARCHS": str(arch)}
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/plugins"]
    code = subprocess.run([*pytest, "--durations=10"], cwd=ROOT, env=child, check=False).returncode
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: memory errors were not looked for")
        return code
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-k", SANITIZED]
        found = subprocess.run(command, cwd=ROOT, env=child, check=False).returncode
        # pytest says 5 where no test has such a name.
        if found == 5:
            print(f"{tool}: no test is named *{SANITIZED}*")
        else:
            print(f"{tool}: {'clean' if found == 0 else f'code {found}'}")
            code = code or found
    return code


def run_benchmarks(facts: dict[str, str], result: BuildResult, only: list[str]) -> int:
    """Runs them one after the other; 1 where one failed or missed a goal."""
    scripts = sorted(HERE.glob("*_bench.py"))
    chosen = [script for script in scripts if not only or script.stem.removesuffix("_bench") in only]
    if not chosen:
        raise PluginsError(f"no benchmark of that name; there are {', '.join(s.stem for s in scripts) or 'none'}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"hardware": facts, "versions": versions(result), "date": datetime.datetime.now(datetime.UTC).isoformat()}
    failed = []
    for script in chosen:
        stem = script.stem.removesuffix("_bench")
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"
            started = time.monotonic()
            command = [sys.executable, str(script), "--out", str(output)]
            code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
            seconds = round(time.monotonic() - started, 1)
            if code != 0:
                failed.append(stem)
            if not output.is_file():
                print(f"{stem}: code {code} after {seconds} s, no result")
                failed.append(stem)
                continue
            report = {
                **about,
                "benchmark": stem,
                "seconds": seconds,
                "exit_code": code,
                **json.loads(output.read_text()),
            }
        target = RESULTS / f"gpu-{stem}.json"
        target.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{stem}: code {code} after {seconds} s, {target.relative_to(ROOT)}")
    return 1 if failed else 0


def main() -> int:
    """Exit code 0; 1 for a failed test or missed goal; 3 where there is no GPU or compiler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["test", "bench"])
    parser.add_argument("--only", action="append", default=[], metavar="STEM", help="benchmark to run; may be repeated")
    options = parser.parse_args()
    try:
        facts = gpu_facts()
        if options.what == "test":
            return run_tests(facts)
        return run_benchmarks(facts, build_here(facts), options.only)
    except PluginsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
