"""Timing and ceilings, shared by the benchmarks: CUDA graph replays between events, contestants in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any


class Timer:
    """Graph replays between events."""

    def __init__(self, launches: list[Callable[[], Any]]) -> None:
        import torch

        self.torch, self.count = torch, len(launches)
        self.launches = launches  # they keep alive what the graph reads
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
        return float(start.elapsed_time(end)) * 1000 / self.count


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
