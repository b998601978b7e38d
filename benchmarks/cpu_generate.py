"""Engine against transformers on the CPU: the same weights, one run, taking turns.

    python benchmarks/cpu_generate.py --json benchmarks/results/cpu_generate_small.json

Every contestant lives in a process of its own, so that peak memory is its own; only one works at a time, and they take turns in every
round, so that a busy moment of the machine meets all of them. Reported are medians over the rounds with the spread, and ratios of
medians. The transformers port turns all channels of a head instead of half of them (a known fault), which changes its output and
hardly its time; nothing here compares outputs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

CONTESTANTS = ("engine", "transformers-float32", "transformers-float32-compiled", "transformers-bfloat16")
SETUP_SECONDS = 300  # torch.compile takes minutes on two cores
ROUND_SECONDS = 600


class Runner(Protocol):
    def prefill(self, tokens: list[int]) -> int:
        """Start a new sequence; the most likely next token."""
        ...

    def decode(self, token: int) -> int:
        """Continue it by one token; the most likely next one."""
        ...


class EngineRunner:
    def __init__(self, folder: str, threads: int) -> None:
        from engines.onnxruntime.session import load

        self.session = load(folder, threads=threads)

    def prefill(self, tokens: list[int]) -> int:
        self.state = self.session.new_state(1)
        return int(self.session.prefill([tokens], self.state)[0].argmax())

    def decode(self, token: int) -> int:
        return int(self.session.decode([token], self.state)[0].argmax())


class TransformersRunner:
    def __init__(self, folder: str, threads: int, dtype: str, compiled: bool) -> None:
        import torch
        from transformers import MiniMaxForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = MiniMaxForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.call: Callable[..., Any] = torch.compile(self.model, dynamic=True) if compiled else self.model

    def _step(self, tokens: list[int]) -> int:
        # Positions are given because the port counts the past in layer 0, which keeps none.
        positions = self.torch.arange(self.length, self.length + len(tokens))[None]
        output = self.call(
            input_ids=self.torch.tensor([tokens]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        self.length += len(tokens)
        return int(output.logits[0, -1].argmax())

    def prefill(self, tokens: list[int]) -> int:
        self.length, self.cache = 0, None
        return self._step(tokens)

    def decode(self, token: int) -> int:
        return self._step([token])


def worker(name: str, folders: dict[str, str], threads: int, pipe: Any) -> None:
    """A contestant's process: set up, then answer (prompt, new tokens) with its times until told to stop."""
    try:
        if name == "engine":
            runner: Runner = EngineRunner(folders["engine"], threads)
        else:
            dtype = name.split("-")[1]
            runner = TransformersRunner(folders["checkpoint"], threads, dtype, name.endswith("compiled"))
        token = runner.prefill([1, 2, 3, 4, 5, 6, 7, 8])
        for _ in range(3):
            token = runner.decode(token)
        pipe.send({"ready": True})
        while (task := pipe.recv()) is not None:
            pipe.send(_timed(runner, *task))
    except Exception as error:  # reported to the parent, which leaves this contestant out and says why
        pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


def _timed(runner: Runner, prompt: list[int], new_tokens: int) -> dict[str, float]:
    start = time.perf_counter()
    token = runner.prefill(prompt)
    first = time.perf_counter()
    for _ in range(new_tokens):
        token = runner.decode(token)
    done = time.perf_counter()
    return {
        "time_to_first_token": first - start,
        "prefill_tokens_per_second": len(prompt) / (first - start),
        "decode_tokens_per_second": new_tokens / (done - first),
        "peak_rss_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """Most resident memory of this process. Not ru_maxrss: a process inherits that from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell peak memory")


def measure(options: argparse.Namespace, folders: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Results by contestant and prompt length, and the reasons of those that could not take part."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    processes, failed = [], {}
    for name in options.contestants:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(name, folders, options.threads, there), daemon=True)
        process.start()
        processes.append(process)
        answer = here.recv() if here.poll(SETUP_SECONDS) else {"error": f"not ready in {SETUP_SECONDS} s"}
        if "error" in answer:
            failed[name] = answer["error"]
        else:
            pipes[name] = here
    runs: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {n: [] for n in options.prompt_lengths} for name in pipes
    }
    for round_number in range(options.warmup + options.rounds):
        for length in options.prompt_lengths:
            prompt = [(7 * i * i + 3 * i + round_number) % 1000 + 1 for i in range(length)]
            order = list(pipes) if round_number % 2 else list(pipes)[::-1]
            for name in order:
                pipes[name].send((prompt, options.new_tokens))
                answer = pipes[name].recv() if pipes[name].poll(ROUND_SECONDS) else {"error": f"over {ROUND_SECONDS} s"}
                if "error" in answer:
                    failed[name] = answer["error"]
                    del pipes[name], runs[name]
                elif round_number >= options.warmup:
                    runs[name][length].append(answer)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(10)
        process.kill()
    return {
        name: {str(n): _summary(samples) for n, samples in by_length.items()} for name, by_length in runs.items()
    }, failed


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        summary[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return summary


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """How many times better the engine is: above 1 means faster, or less memory."""
    out: dict[str, Any] = {}
    for rival in results:
        if rival == "engine" or "engine" not in results:
            continue
        out[rival] = {}
        for length, ours in results["engine"].items():
            theirs = results[rival][length]
            out[rival][length] = {
                key: round(
                    (ours[key]["median"] / theirs[key]["median"])
                    if key.endswith("per_second")
                    else (theirs[key]["median"] / ours[key]["median"]),
                    3,
                )
                for key in ours
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = {"checkpoint": f"{folder}/checkpoint", "engine": f"{folder}/engine"}
        import mxcompile
        from model_defs.checkpoint.create import create_checkpoint
        from model_defs.presets import preset

        create_checkpoint(preset(options.preset), folders["checkpoint"], seed=0, schema="hf")
        mxcompile.build(folders["checkpoint"], folders["engine"], max_seq_len=2 * max(options.prompt_lengths))
        results, failed = measure(options, folders)
    report = {
        "benchmark": "cpu_generate",
        "date": date.today().isoformat(),
        "preset": options.preset,
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "threads": options.threads},
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "transformers", "numpy")},
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        "results": results,
        "ratios": ratios(results),
        "left_out": failed,
    }
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
