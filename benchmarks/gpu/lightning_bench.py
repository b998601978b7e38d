"""Times the lightning attention kernels on a GPU beside their rival and the machine's own ceilings.

    python benchmarks/gpu/lightning_bench.py --out lightning.json

Every case rotates over enough input sets to leave the L2 cold, replays CUDA graphs, and alternates contestants round by round;
the number is the median over rounds. Ceilings (a device copy, a bf16 matrix product on random data) are measured in the same run.
The floor of a case is the larger of its least bytes over the copy bandwidth and its operations over the matrix rate.
Each kernel runs in a process of its own, so one that fails or hangs leaves the others' numbers. Kernels: portable (mma), sm90
(value halves of a head share their loads in a cluster), apart (they do not). Exit code 1 where a kernel is wrong or a goal missed.
Rival: flash-linear-attention's chunk_simple_gla, beside the portable kernel in a process of its own, and last: its first launch
compiles and times some fifty variants, which must not take our kernels' time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/plugins"), str(ROOT / "benchmarks/gpu")]

from parts import add_options, supervise_parts, work  # noqa: E402
from timing import Timer, alternate, ceilings  # noqa: E402

HEAD_DIM = 128
STATE_BYTES = HEAD_DIM * HEAD_DIM * 4
FLOP_PER_TOKEN_HEAD = 4 * 64 * HEAD_DIM + 4 * HEAD_DIM * HEAD_DIM
PREFILL = [(1, 8192, 64), (8, 4096, 64), (1, 8192, 8), (1, 1024, 64), (1, 131072, 8), (1, 131072, 64)]  # goals first
KERNELS = ("portable", "sm90", "apart")  # LightningPlan.kernel 0, 1, 2
RIVAL = "fla"
PARTS = (*KERNELS, RIVAL)
DECODE = [1, 4, 16, 64, 256]
# What the project set out to reach on an H200, in microseconds (prefill) or as a share of copy bandwidth (decode).
GOALS_US = {(1, 8192, 64): 200.0, (8, 4096, 64): 670.0, (1, 8192, 8): 45.0}
GOAL_DECODE_SHARE, GOAL_DECODE_FROM = 0.85, 16
GOAL_OVER_FLA = {(1, 8192, 64): 1.5, (8, 4096, 64): 2.0}
L2_BYTES = 64 << 20


def prefill_bytes(batch: int, tokens: int, heads: int) -> int:
    """Least bytes: q, k, v read, o written, states read and written."""
    return batch * heads * (4 * 2 * HEAD_DIM * tokens + 2 * STATE_BYTES)


def decode_bytes(batch: int, heads: int) -> int:
    return batch * heads * (2 * STATE_BYTES + 4 * 2 * HEAD_DIM)


def fla_launch(inputs: Any) -> Callable[[], Any]:
    """chunk_simple_gla on the same inputs."""
    from fla.ops.simple_gla import chunk_simple_gla

    gamma = -inputs.slopes
    return lambda: chunk_simple_gla(
        inputs.q, inputs.k, inputs.v, g_gamma=gamma, scale=1.0, initial_state=inputs.state, output_final_state=True
    )


def plans_of(part: str, library: Any, inputs: Any) -> dict[str, Any]:
    """The planner's choice and the other modes of that kernel; of `apart` what differs from sm90; one beside the rival."""
    from lightning_gpu import device_plan

    from plugins.library import LightningPlan

    chosen = device_plan(library, inputs)
    kernel = chosen.kernel = 0 if part == RIVAL else KERNELS.index(part)
    chunks = -(-inputs.q.shape[1] // 64)
    if part == RIVAL:
        return {"portable as planned, beside fla": chosen}
    plans = {f"{part} as planned ({chosen.value_splits} values, {chosen.segments} segments)": chosen}
    for splits in (1, 2):
        if (splits, 1) != (chosen.value_splits, chosen.segments):
            plan = LightningPlan(kernel=kernel, value_splits=splits, segments=1, segment_chunks=chunks)
            plans[f"{part} ({splits} values, 1 segments)"] = plan
    return {name: plan for name, plan in plans.items() if part != "apart" or plan.value_splits == 2}


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


def run_prefill(
    part: str, shape: tuple[int, int, int], library: Any, limits: dict[str, float], rounds: int
) -> dict[str, Any]:
    """One shape: every plan of that kernel, checked against fp64, and the rival."""
    import torch
    from lightning_gpu import make_inputs, reference, relative_rms, run

    batch, tokens, heads = shape
    least = prefill_bytes(batch, tokens, heads)
    operations = FLOP_PER_TOKEN_HEAD * batch * tokens * heads
    floor = max(least / limits["copy_bytes_per_s"], operations / limits["matmul_flop_per_s"]) * 1e6
    sets = [make_inputs(batch, tokens, heads, layer=40, seed=i) for i in range(sets_for(least))]
    row: dict[str, Any] = {"case": case_name(shape), "floor_us": floor, "contestants": {}}
    timers: dict[str, Timer] = {}
    want = reference(sets[0]) if tokens <= 8192 else None
    for name, plan in plans_of(part, library, sets[0]).items():
        entry = row["contestants"].setdefault(name, {})
        out, state = run(library, sets[0], plan)
        if want is not None:
            entry["out_error"], entry["state_error"] = relative_rms(out, want[0]), relative_rms(state, want[1])
            if not (entry["out_error"] <= 4e-3 and entry["state_error"] <= 2e-4):
                entry["wrong"] = True  # a wrong kernel gets no time
                continue
        timers[name] = Timer([prefill_launch(library, inputs, plan) for inputs in sets])
        del out, state
    del want
    if part == RIVAL:
        timers[RIVAL] = Timer([fla_launch(inputs) for inputs in sets])
    for name, times in alternate(timers, rounds).items():
        row["contestants"].setdefault(name, {}).update(times, share_of_floor=floor / times["us"])
    if shape in GOALS_US:
        row["goal_us"] = GOALS_US[shape]
    del sets, timers
    torch.cuda.empty_cache()
    return row


def run_decode(batch: int, library: Any, limits: dict[str, float], rounds: int) -> dict[str, Any]:
    """One batch size, over as many layers' states in turn as leave the L2 cold, updated in place."""
    import torch
    from lightning_gpu import make_inputs, params_of

    heads = 64
    least = decode_bytes(batch, heads)
    floor = least / limits["copy_bytes_per_s"] * 1e6
    launches: list[Callable[[], Any]] = []
    for i in range(max(16, sets_for(least))):
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
    del launches
    torch.cuda.empty_cache()
    return row


def case_name(shape: tuple[int, int, int]) -> str:
    return f"prefill ({shape[0]}, {shape[1]}) {shape[2]} heads"


def keys_of(part: str) -> list[str]:
    """What a part works through, the cases with goals first."""
    prefill = ["prefill " + " ".join(map(str, shape)) for shape in (GOALS_US if part == RIVAL else PREFILL)]
    return prefill[:3] + [f"decode {batch}" for batch in DECODE] + prefill[3:] if part == "portable" else prefill


def child(options: argparse.Namespace) -> int:
    """One part's keys in this process."""
    loaded: list[Any] = []

    def about() -> dict[str, Any]:
        import torch

        from plugins.library import load

        loaded.append(load(options.library_dir))
        loaded[0].check_device()
        if options.part == RIVAL:
            import fla.ops.simple_gla  # noqa: F401  (not installed, or not made for the torch that is here: no rival)
        elif options.part != "portable" and torch.cuda.get_device_capability() != (9, 0):
            raise RuntimeError("the sm_90a kernel needs compute capability 9.0")
        return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **ceilings(options.rounds)}

    def run(key: str, limits: dict[str, Any]) -> dict[str, Any]:
        kind, *numbers = key.split()
        if kind == "decode":
            return run_decode(int(numbers[0]), loaded[0], limits, options.rounds)
        batch, tokens, heads = map(int, numbers)
        return run_prefill(options.part, (batch, tokens, heads), loaded[0], limits, options.rounds)

    return work(options, about, run)


def goals(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was to be reached, the best that any kernel reached, and whether."""
    found: dict[str, dict[str, Any]] = {}

    def entries(case: str) -> list[dict[str, Any]]:
        rows = [row for part in parts.values() for row in part["rows"].values() if row["case"] == case]
        return [entry for row in rows for name, entry in row["contestants"].items() if name != RIVAL and "us" in entry]

    for shape, most in GOALS_US.items():
        times = entries(case_name(shape))
        reached = min((entry["us"] for entry in times), default=None)
        found[f"{case_name(shape)}, us"] = {
            "goal": most,
            "reached": reached,
            "met": reached is not None and reached <= most,
        }
        if shape in GOAL_OVER_FLA:
            faster = max((entry.get("speedup_over_fla", 0.0) for entry in times), default=0.0)
            goal = GOAL_OVER_FLA[shape]
            found[f"{case_name(shape)}, times FLA"] = {"goal": goal, "reached": faster, "met": faster >= goal}
    for batch in (batch for batch in DECODE if batch >= GOAL_DECODE_FROM):
        share = max((entry["share_of_floor"] for entry in entries(f"decode batch {batch} 64 heads")), default=0.0)
        met = share >= GOAL_DECODE_SHARE
        found[f"decode batch {batch}, share of copy"] = {"goal": GOAL_DECODE_SHARE, "reached": share, "met": met}
    return found


def compare(parts: dict[str, Any]) -> None:
    """Puts into every row of a case that the rival has run how many times faster ours is."""
    rows = [row for part in parts.values() for row in part["rows"].values()]
    rival = {row["case"]: row["contestants"][RIVAL]["us"] for row in rows if "us" in row["contestants"].get(RIVAL, {})}
    for row in rows:
        for name, entry in row["contestants"].items():
            if row["case"] in rival and name != RIVAL and "us" in entry:
                entry["speedup_over_fla"] = rival[row["case"]] / entry["us"]


def assemble(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report of what has been measured so far."""
    compare(results)
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
            goal = f", goal {row['goal_us']:.0f} us" if "goal_us" in row else ""
            goal += f", goal {row['goal_share_of_copy']:.0%} of copy" if "goal_share_of_copy" in row else ""
            print(f"  {row['case']}: floor {row['floor_us']:.1f} us{goal}")
            for name, entry in row["contestants"].items():
                if "us" not in entry:
                    print(f"    {name:<52} WRONG: {entry}")
                    continue
                beside = f", {entry['speedup_over_fla']:.2f}x FLA" if "speedup_over_fla" in entry else ""
                print(f"    {name:<52} {entry['us']:9.1f} us, {entry['share_of_floor']:.0%} of the floor{beside}")
    for name, entry in report["goals"].items():
        print(f"  {name}: {entry['reached']}, goal {entry['goal']}: {'met' if entry['met'] else 'MISSED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "lightning_bench.json", 11)
    options = parser.parse_args()
    if options.part:
        return child(options)
    report = supervise_parts(Path(__file__), {part: keys_of(part) for part in PARTS}, options, assemble, RIVAL)
    show(report)
    parts = report["parts"].values()
    wrong = any("wrong" in entry for p in parts for row in p["rows"].values() for entry in row["contestants"].values())
    lost = any(part["lost"] for part in parts)
    return 1 if wrong or lost or not all(entry["met"] for entry in report["goals"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
