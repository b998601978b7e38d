"""Times the mixture of experts on a GPU beside torch's ways of computing it and the machine's own ceilings.

    python benchmarks/gpu/moe_bench.py --out moe.json

The shape is MiniMax-Text-01's: hidden 6144, inner 9216, 32 experts, 2 per token; random data. Each case rotates over several sets
of tokens on one set of weights (which is hundreds of times the L2, so they come from memory each time), replays CUDA graphs and
alternates contestants round by round; the number is the median over rounds. Ceilings (a device copy, a bf16 matrix product) are
measured in the same run. The floor of a case is the larger of the bytes of the experts its tokens really touch over the copy
bandwidth and its operations over the matrix rate. A contestant whose result is wrong gets no time.

The portable kernels and the sm_90a ones run in processes of their own, each beside the rivals, so one that fails or hangs leaves the
others' numbers. Rivals are given the routing, sorted, for nothing: torch's product per expert (loop) and torch._grouped_mm.
Goals: 80 % of the bandwidth at 1 token; 640 TFLOP/s in the grouped GEMMs alone at 16384 tokens. Exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/plugins"), str(ROOT / "benchmarks/gpu")]

from parts import add_options, supervise_parts, work  # noqa: E402
from timing import Timer, alternate, ceilings  # noqa: E402

from plugins.errors import KernelError  # noqa: E402

HIDDEN, INNER, EXPERTS, TOP_K = 6144, 9216, 32, 2
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
ROUTINGS = {"uniform": 0.0, "skewed": 1.0}  # expert e favoured by (1 + e)^-skew
FLOP_PER_TOKEN = TOP_K * 2 * 3 * HIDDEN * INNER
GOAL_ONE_TOKEN_SHARE = 0.80
GOAL_GROUPED_FLOPS = 640e12
ERROR_BOUND = 4e-3
SMALL, MEDIUM = 256, 1024  # up to SMALL the few-token kernels compete, from MEDIUM the 128-token tiles and sm_90a


class Ours:
    """Launches of the library on one path, all on one output and workspace."""

    def __init__(self, library: Any, sets: list[Any], path: str | None) -> None:
        import torch
        from moe_gpu import forced, params_of

        self.library, self.path, self.params = library, path, []
        with forced(path):
            self.out = torch.empty_like(sets[0].x)
            needed = library.moe_workspace_bytes(params_of(sets[0], self.out))
            self.workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
        for inputs in sets:
            params = params_of(inputs, self.out)
            params.workspace, params.workspace_bytes = self.workspace.data_ptr(), needed
            self.params.append(params)

    def launches(self) -> list[Callable[[], None]]:
        return [lambda params=params: self.launch(params) for params in self.params]  # type: ignore[misc]

    def launch(self, params: Any) -> None:
        import torch
        from moe_gpu import forced

        with forced(self.path):
            self.library.moe(params, torch.cuda.current_stream().cuda_stream)

    def kernels(self) -> dict[str, float]:
        """Microseconds of each kernel in one launch, from the profiler; empty where it does not work."""
        import torch

        try:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                for params in self.params:
                    self.launch(params)
                torch.cuda.synchronize()
            found: dict[str, float] = {}
            for event in profile.key_averages():
                if event.device_time_total > 0:
                    found[event.key[:90]] = event.device_time_total / len(self.params)
            return found
        except Exception as error:
            return {f"profiler failed: {type(error).__name__}": 0.0}


def sorted_rows(inputs: Any) -> tuple[Any, Any, list[int], Any]:
    """(row's token [R], row's weight [R, 1], rows of each expert, their running ends int32 [E])."""
    import torch
    from moe_gpu import route

    chosen, weights = route(inputs)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    ends = counts.cumsum(0).to(torch.int32)
    return order // TOP_K, weights.flatten()[order][:, None].to(inputs.x.dtype), counts.tolist(), ends


def loop_launch(inputs: Any) -> Callable[[], Any]:
    """One product per expert, as a plain PyTorch model does; the halves of fc1's result stand for gate and up."""
    import torch

    tokens, weights, counts, _ = sorted_rows(inputs)
    out = torch.empty_like(inputs.x)

    def launch() -> Any:
        rows = inputs.x[tokens]
        parts, begin = [], 0
        for expert, count in enumerate(counts):
            if count:
                gate, up = (rows[begin : begin + count] @ inputs.fc1[expert].T).chunk(2, -1)
                parts.append((torch.nn.functional.silu(gate) * up) @ inputs.fc2[expert].T)
                begin += count
        out.zero_().index_add_(0, tokens, torch.cat(parts) * weights)
        return out

    return launch


def grouped_launch(inputs: Any) -> Callable[[], Any] | None:
    """torch._grouped_mm, or None where there is none."""
    import torch

    if not hasattr(torch, "_grouped_mm"):
        return None
    tokens, weights, _, ends = sorted_rows(inputs)
    out = torch.empty_like(inputs.x)
    fc1, fc2 = inputs.fc1.transpose(1, 2), inputs.fc2.transpose(1, 2)

    def launch() -> Any:
        gate, up = torch._grouped_mm(inputs.x[tokens], fc1, offs=ends).chunk(2, -1)
        rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, fc2, offs=ends)
        out.zero_().index_add_(0, tokens, rows * weights)
        return out

    return launch


def our_paths(part: str, tokens: int) -> list[str | None]:
    """The planned path (None) and those worth comparing at this size."""
    if part == "sm90":
        return ["sm90"]
    paths: list[str | None] = [None]
    paths += ["stream"] if tokens <= SMALL else []
    paths += ["grouped64"] if 16 <= tokens <= 4096 else []
    return paths + (["grouped128"] if tokens >= MEDIUM else [])


def touched_bytes(sets: list[Any], bytes_per_weight: int) -> float:
    """Weights of the experts that a set's tokens go to, mean over the sets, plus tokens in and out."""
    from moe_gpu import route

    experts = statistics.mean(len(route(inputs)[0].unique()) for inputs in sets)
    return experts * 3 * HIDDEN * INNER * bytes_per_weight + 2 * sets[0].x.nbytes


def error_of(inputs: Any, out: Any) -> float:
    """Relative RMS error of up to 48 tokens against fp64."""
    import torch
    from moe_gpu import reference, relative_rms

    count = len(inputs.x)
    tokens = torch.linspace(0, count - 1, min(count, 48), device="cuda").long()
    return relative_rms(out[tokens], reference(inputs, tokens=tokens))


def run_case(
    part: str, library: Any, tokens: int, routing: str, weights: Any, limits: dict[str, float], rounds: int
) -> dict[str, Any]:
    """All contestants of one number of tokens, routing and weight type."""
    import torch
    from moe_gpu import Inputs, make_tokens

    int8 = weights[0].dtype == torch.int8
    count = 8 if tokens <= MEDIUM else 2
    sets = [
        Inputs(*make_tokens(tokens, HIDDEN, EXPERTS, skew=ROUTINGS[routing], seed=i), *weights, TOP_K)
        for i in range(count)
    ]
    least, operations = touched_bytes(sets, weights[0].element_size()), tokens * FLOP_PER_TOKEN
    by_memory, by_rate = least / limits["copy_bytes_per_s"] * 1e6, operations / limits["matmul_flop_per_s"] * 1e6
    row: dict[str, Any] = {
        "case": f"{tokens} tokens, {routing}, {'int8' if int8 else 'bf16'} weights",
        "tokens": tokens,
        "floor_us": max(by_memory, by_rate),
        "bound": "memory" if by_memory > by_rate else "matrix rate",
        "contestants": {},
    }
    timers: dict[str, Timer] = {}
    kept: list[Any] = []
    for path in our_paths(part, tokens):
        name = f"ours, {path or 'as planned'}"
        entry = row["contestants"].setdefault(name, {})
        try:
            ours = Ours(library, sets, path)
            ours.out.fill_(float("nan"))
            ours.launch(ours.params[0])
            torch.cuda.synchronize()
            entry["error"] = error_of(sets[0], ours.out)
            if not entry["error"] <= ERROR_BOUND:
                entry["wrong"] = True
                continue
            entry["kernels_us"] = ours.kernels()
            timers[name] = Timer(ours.launches())
            kept.append(ours)
        except KernelError as error:  # a refusal leaves the others' numbers
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
    rivals = {} if int8 else {"torch loop": loop_launch, "torch._grouped_mm": grouped_launch}
    for name, make in rivals.items():
        try:
            launches = [launch for launch in map(make, sets) if launch is not None]
            if launches:
                timers[name] = Timer(launches)
        except Exception as error:
            row["contestants"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    for name, times in alternate(timers, rounds).items():
        row["contestants"].setdefault(name, {}).update(
            times,
            share_of_floor=row["floor_us"] / times["us"],
            tflops=operations / times["us"] / 1e6,
            tb_per_s=least / times["us"] / 1e6,
        )
    del timers, kept
    torch.cuda.empty_cache()
    return row


def gemm_rate(row: dict[str, Any]) -> float:
    """FLOP/s of the two products alone in the best of our contestants, from the profiler; 0 where it saw nothing."""
    best = 0.0
    for name, entry in row["contestants"].items():
        times = [
            us
            for kernel, us in entry.get("kernels_us", {}).items()
            if "MoeGrouped<" in kernel or "multiplyFc" in kernel
        ]
        if name.startswith("ours") and times and sum(times) > 0:
            best = max(best, row["tokens"] * FLOP_PER_TOKEN / sum(times) * 1e6)
    return best


def case_key(tokens: int, routing: str, kind: str) -> str:
    return f"{tokens} {routing} {kind}"


def keys_of(part: str, wanted: list[int]) -> list[str]:
    """What a part works through: bf16 before int8 (weights are made once for each), the cases with goals first."""
    kinds = ("bf16",) if part == "sm90" else ("bf16", "int8")
    tokens = [count for count in wanted if part != "sm90" or count >= SMALL]
    ordered = sorted(tokens, key=lambda count: (count not in (1, 16384), count))
    return [case_key(count, routing, kind) for kind in kinds for routing in ROUTINGS for count in ordered]


def child(options: argparse.Namespace) -> int:
    """One part's keys in this process."""
    loaded: list[Any] = []
    weights: dict[str, Any] = {}

    def about() -> dict[str, Any]:
        import torch

        from plugins.library import load

        loaded.append(load(options.library_dir))
        loaded[0].check_device()
        if options.part == "sm90" and torch.cuda.get_device_capability() != (9, 0):
            raise RuntimeError("the sm_90a kernels need compute capability 9.0")
        return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **ceilings(options.rounds)}

    def run(key: str, limits: dict[str, Any]) -> dict[str, Any]:
        from moe_gpu import make_weights

        tokens, routing, kind = key.split()
        if kind not in weights:
            weights.clear()
            weights[kind] = make_weights(EXPERTS, HIDDEN, INNER, int8=kind == "int8")
        return run_case(options.part, loaded[0], int(tokens), routing, weights[kind], limits, options.rounds)

    return work(options, about, run)


def goals(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was to be reached, what was, and whether."""
    found: dict[str, dict[str, Any]] = {}

    def rows(key: str) -> list[dict[str, Any]]:
        return [part["rows"][key] for part in parts.values() if key in part["rows"]]

    shares = [row["contestants"].get("ours, as planned", {}) for row in rows(case_key(1, "uniform", "bf16"))]
    share = max((entry.get("share_of_floor", 0.0) for entry in shares), default=0.0)
    rate = max((gemm_rate(row) for row in rows(case_key(16384, "uniform", "bf16"))), default=0.0)
    found["share of bandwidth at 1 token"] = {"goal": GOAL_ONE_TOKEN_SHARE, "reached": share}
    found["grouped GEMM FLOP/s at 16384 tokens"] = {"goal": GOAL_GROUPED_FLOPS, "reached": rate}
    return {name: {**entry, "met": entry["reached"] >= entry["goal"]} for name, entry in found.items()}


def assemble(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report of what has been measured so far."""
    return {"parts": results, "goals": goals(results)}


def show(report: dict[str, Any]) -> None:
    for part, result in report["parts"].items():
        about = result["about"] or {}
        if about:
            copy, matmul = about["copy_bytes_per_s"] / 1e12, about["matmul_flop_per_s"] / 1e12
            print(f"{part} on {about['gpu']}: copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s, {result['seconds']} s")
        for why in dict.fromkeys(result["lost"].values()):
            print(f"{part}: {why}: {', '.join(key for key, said in result['lost'].items() if said == why)}")
        for row in result["rows"].values():
            print(f"  {row['case']}: floor {row['floor_us']:.0f} us ({row['bound']})")
            for name, entry in row["contestants"].items():
                if "us" not in entry:
                    print(f"    {name:<24} {entry}")
                    continue
                print(
                    f"    {name:<24} {entry['us']:10.1f} us, {entry['share_of_floor']:.0%} of the floor, "
                    f"{entry['tflops']:.0f} TFLOP/s, {entry['tb_per_s']:.2f} TB/s"
                )
    for name, entry in report["goals"].items():
        print(f"  {name}: {entry['reached']:.3g}, goal {entry['goal']:.3g}: {'met' if entry['met'] else 'MISSED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "moe_bench.json", 7)
    parser.add_argument("--tokens", type=int, action="append", help="only these numbers of tokens; may be repeated")
    options = parser.parse_args()
    if options.part:
        return child(options)
    parts = {part: keys_of(part, options.tokens or TOKENS) for part in ("portable", "sm90")}
    report = supervise_parts(Path(__file__), parts, options, assemble)
    show(report)
    results = report["parts"].values()
    entries = [entry for p in results for row in p["rows"].values() for entry in row["contestants"].values()]
    bad = any("wrong" in entry or "failed" in entry for entry in entries) or any(part["lost"] for part in results)
    return 1 if bad or not all(entry["met"] for entry in report["goals"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
