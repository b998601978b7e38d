"""Times the lightning attention kernels on a GPU beside their rival and the machine's own ceilings.

    python benchmarks/gpu/lightning_bench.py --out lightning.json

Every case rotates over enough input sets to leave the L2 cold, replays CUDA graphs, and alternates contestants round by round;
the number is the median over rounds. Ceilings (a device copy, a bf16 matrix product on random data) are measured in the same run.
The floor of a case is the larger of its least bytes over the copy bandwidth and its operations over the matrix rate.
Each kernel runs in a process of its own, so one that fails or hangs leaves the other's numbers.
Rival: flash-linear-attention's chunk_simple_gla, where it can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/plugins")]

HEAD_DIM = 128
STATE_BYTES = HEAD_DIM * HEAD_DIM * 4
FLOP_PER_TOKEN_HEAD = 4 * 64 * HEAD_DIM + 4 * HEAD_DIM * HEAD_DIM
PREFILL = [(1, 1024, 64), (1, 8192, 64), (8, 4096, 64), (1, 131072, 64), (1, 8192, 8), (1, 131072, 8)]
DECODE = [1, 4, 16, 64, 256]
# What the project set out to reach on an H200, in microseconds (prefill) or as a share of copy bandwidth (decode).
GOALS_US = {(1, 8192, 64): 200.0, (8, 4096, 64): 670.0, (1, 8192, 8): 45.0}
GOAL_DECODE_SHARE, GOAL_DECODE_FROM = 0.85, 16
PART_TIMEOUT_S = 200
L2_BYTES = 64 << 20


def prefill_bytes(batch: int, tokens: int, heads: int) -> int:
    """Least bytes: q, k, v read, o written, states read and written."""
    return batch * heads * (4 * 2 * HEAD_DIM * tokens + 2 * STATE_BYTES)


def decode_bytes(batch: int, heads: int) -> int:
    return batch * heads * (2 * STATE_BYTES + 4 * 2 * HEAD_DIM)


class Timer:
    """Graph replays between events."""

    def __init__(self, launches: list[Callable[[], Any]]) -> None:
        import torch

        self.torch, self.count = torch, len(launches)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # load and compile outside the capture
            for launch in launches[:2]:
                launch()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [launch() for launch in launches]
        self.microseconds()

    def microseconds(self) -> float:
        """Mean time of one launch over one pass through all input sets."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / self.count


def alternate(timers: dict[str, Timer], rounds: int) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest round of every contestant, taken in turn."""
    seen: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in list(timers) if turn % 2 == 0 else reversed(list(timers)):
            seen[name].append(timers[name].microseconds())
    return {name: {"us": statistics.median(x), "least_us": min(x), "most_us": max(x)} for name, x in seen.items()}


def ceilings(rounds: int) -> dict[str, float]:
    """Copy bandwidth in bytes/s (read plus written) and bf16 matrix rate in FLOP/s, on random data."""
    import torch

    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    timers = {
        "copy": Timer([lambda: target.copy_(source)] * 2),
        "matmul": Timer([lambda: torch.matmul(a, b, out=c)] * 4),
    }
    times = alternate(timers, rounds)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / times["copy"]["us"] * 1e6,
        "matmul_flop_per_s": 2 * n**3 / times["matmul"]["us"] * 1e6,
    }


def fla_launch(inputs: Any) -> Callable[[], Any] | None:
    """chunk_simple_gla on the same inputs, or None where it cannot be imported."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    gamma = -inputs.slopes
    return lambda: chunk_simple_gla(
        inputs.q, inputs.k, inputs.v, g_gamma=gamma, scale=1.0, initial_state=inputs.state, output_final_state=True
    )


def plans_of(part: str, library: Any, inputs: Any) -> dict[str, Any]:
    """The planner's choice and the other modes of that kernel."""
    from lightning_gpu import device_plan

    from plugins.library import LightningPlan

    chosen = device_plan(library, inputs)
    kernel = int(part == "sm90")
    chosen.kernel = kernel
    chunks = -(-inputs.q.shape[1] // 64)
    plans = {f"{part} as planned ({chosen.value_splits} values, {chosen.segments} segments)": chosen}
    for splits in (1, 2):
        if (splits, 1) != (chosen.value_splits, chosen.segments):
            plan = LightningPlan(kernel=kernel, value_splits=splits, segments=1, segment_chunks=chunks)
            plans[f"{part} ({splits} values, 1 segments)"] = plan
    return plans


def prefill_launch(library: Any, inputs: Any, plan: Any) -> Callable[[], Any]:
    """A launch over this input set, with outputs of its own."""
    import torch
    from lightning_gpu import params_of

    out = torch.empty_like(inputs.q)
    needed = library.lightning_workspace_bytes(plan, *(inputs.q.shape[i] for i in (0, 2, 3)))
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    state_out = torch.empty_like(inputs.state)
    params = params_of(inputs, out, inputs.state, state_out)
    params.workspace, params.workspace_bytes = workspace.data_ptr(), needed

    def launch() -> Any:
        library.lightning_prefill(params, plan, torch.cuda.current_stream().cuda_stream)
        return inputs, out, state_out, workspace  # kept alive with the graph

    return launch


def sets_for(bytes_of_one: int) -> int:
    """Input sets so that each pass reads many times the L2, at least 4 and at most 24."""
    return max(4, min(24, -(-16 * L2_BYTES // bytes_of_one)))


def run_prefill(part: str, library: Any, limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    import torch
    from lightning_gpu import make_inputs, reference, relative_rms, run

    results = []
    for batch, tokens, heads in PREFILL:
        least = prefill_bytes(batch, tokens, heads)
        floor = (
            max(
                least / limits["copy_bytes_per_s"],
                FLOP_PER_TOKEN_HEAD * batch * tokens * heads / limits["matmul_flop_per_s"],
            )
            * 1e6
        )
        sets = [make_inputs(batch, tokens, heads, layer=40, seed=i) for i in range(sets_for(least))]
        row: dict[str, Any] = {
            "case": f"prefill ({batch}, {tokens}) {heads} heads",
            "floor_us": floor,
            "contestants": {},
        }
        plans = plans_of(part, library, sets[0])
        timers = {}
        want = reference(sets[0]) if tokens <= 8192 else None
        for name, plan in plans.items():
            out, state = run(library, sets[0], plan)
            errors = [relative_rms(got, good) for got, good in zip((out, state), want, strict=True)] if want else None
            row["contestants"][name] = {"out_error": errors[0], "state_error": errors[1]} if errors else {}
            if errors and (errors[0] > 4e-3 or errors[1] > 2e-4):
                row["contestants"][name]["wrong"] = True  # a wrong kernel gets no time
                continue
            timers[name] = Timer([prefill_launch(library, inputs, plan) for inputs in sets])
            del out, state
        del want
        rivals = [fla_launch(inputs) for inputs in sets]
        if rivals[0] is not None:
            try:
                timers["fla"] = Timer([rival for rival in rivals if rival is not None])
            except Exception as error:  # whatever the rival fails with is not ours to stop at
                row["fla_error"] = f"{type(error).__name__}: {error}"[:300]
        for name, times in alternate(timers, rounds).items():
            entry = row["contestants"].setdefault(name, {})
            entry.update(times, share_of_floor=floor / times["us"])
        if "fla" in row["contestants"]:
            for name, entry in row["contestants"].items():
                if name != "fla" and "us" in entry:
                    entry["speedup_over_fla"] = row["contestants"]["fla"]["us"] / entry["us"]
        goal = GOALS_US.get((batch, tokens, heads))
        if goal is not None:
            row["goal_us"] = goal
        results.append(row)
        del sets, timers, rivals
        torch.cuda.empty_cache()
    return results


def run_decode(library: Any, limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    import torch
    from lightning_gpu import make_inputs, params_of

    results = []
    for batch in DECODE:
        heads = 64
        least = decode_bytes(batch, heads)
        floor = least / limits["copy_bytes_per_s"] * 1e6
        launches: list[Callable[[], Any]] = []
        for i in range(max(16, sets_for(least))):  # as many layers' states in turn, updated in place
            inputs = make_inputs(batch, 1, heads, seed=i)
            out = torch.empty_like(inputs.q)
            params = params_of(inputs, out, inputs.state, inputs.state)

            def launch(inputs: Any = inputs, out: Any = out, params: Any = params) -> Any:
                library.lightning_decode(params, torch.cuda.current_stream().cuda_stream)
                return inputs, out

            launches.append(launch)
        times = alternate({"decode": Timer(launches)}, rounds)["decode"]
        row: dict[str, Any] = {"case": f"decode batch {batch} {heads} heads", "floor_us": floor}
        row["contestants"] = {"decode": {**times, "share_of_floor": floor / times["us"]}}
        if batch >= GOAL_DECODE_FROM:
            row["goal_share_of_copy"] = GOAL_DECODE_SHARE
        results.append(row)
        del launches
        torch.cuda.empty_cache()
    return results


def run_part(part: str, rounds: int, library_dir: Path | None) -> dict[str, Any]:
    import torch

    from plugins.library import load

    library = load(library_dir)
    library.check_device()
    limits = ceilings(rounds)
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **limits}
    if part == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        return {**report, "skipped": "the sm_90a kernel needs compute capability 9.0"}
    report["cases"] = run_prefill(part, library, limits, rounds)
    if part == "portable":
        report["cases"] += run_decode(library, limits, rounds)
    return report


def show(report: dict[str, Any]) -> None:
    for part, result in report.items():
        if "cases" not in result:
            print(f"{part}: {result.get('error') or result.get('skipped')}")
            continue
        copy, matmul = result["copy_bytes_per_s"] / 1e12, result["matmul_flop_per_s"] / 1e12
        print(f"{part} on {result['gpu']}: copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s")
        for row in result["cases"]:
            goal = f", goal {row['goal_us']:.0f} us" if "goal_us" in row else ""
            goal += f", goal {row['goal_share_of_copy']:.0%} of copy" if "goal_share_of_copy" in row else ""
            print(f"  {row['case']}: floor {row['floor_us']:.1f} us{goal}")
            for name, entry in row["contestants"].items():
                if "us" not in entry:
                    print(f"    {name:<52} WRONG: {entry}")
                    continue
                beside = f", {entry['speedup_over_fla']:.2f}x FLA" if "speedup_over_fla" in entry else ""
                print(f"    {name:<52} {entry['us']:9.1f} us, {entry['share_of_floor']:.0%} of the floor{beside}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lightning_bench.json"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--library-dir", type=Path, help="folder of libmxcompile_kernels.so")
    parser.add_argument("--part", choices=["portable", "sm90"], help="run one kernel in this process")
    options = parser.parse_args()
    if options.part:
        options.out.write_text(json.dumps(run_part(options.part, options.rounds, options.library_dir)))
        return 0
    report: dict[str, Any] = {}
    for part in ("portable", "sm90"):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "part.json"
            command = [sys.executable, os.fspath(Path(__file__)), "--part", part, "--out", str(result)]
            command += ["--rounds", str(options.rounds)]
            if options.library_dir:
                command += ["--library-dir", str(options.library_dir)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=PART_TIMEOUT_S, check=False)
                if done.returncode == 0:
                    report[part] = json.loads(result.read_text())
                else:
                    report[part] = {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
            except subprocess.TimeoutExpired:
                report[part] = {"error": f"not done after {PART_TIMEOUT_S} s"}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    return 0 if all("error" not in result for result in report.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
