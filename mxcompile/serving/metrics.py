"""Counts and durations of one scheduler, as the Prometheus text names them."""

from __future__ import annotations

from collections import Counter

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram buckets, in seconds."""


class Histogram:
    """Cumulative buckets, sum and count of durations."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(SECONDS) + 1)  # the last one is +Inf
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        for index, bound in enumerate(SECONDS):
            if seconds <= bound:
                self.buckets[index] += 1
        self.buckets[-1] += 1
        self.total += seconds


class Metrics:
    """Written by the scheduler's thread; read from any (a reader may see one step half counted)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.gauges = {"active_requests": 0, "waiting_requests": 0}
        self.histograms = {
            "time_to_first_token_seconds": Histogram(),
            "inter_token_latency_seconds": Histogram(),
            "queue_seconds": Histogram(),
        }

    def refused(self, kind: str) -> None:
        self.ends[f"refused_{kind}"] += 1

    def ended(self, how: str) -> None:
        self.ends[how] += 1

    def queued(self, seconds: float) -> None:
        self.histograms["queue_seconds"].observe(seconds)

    def first_token(self, seconds: float) -> None:
        self.counts["generated_tokens_total"] += 1
        self.histograms["time_to_first_token_seconds"].observe(seconds)

    def next_token(self, seconds: float) -> None:
        self.counts["generated_tokens_total"] += 1
        self.histograms["inter_token_latency_seconds"].observe(seconds)

    def prompt_tokens(self, count: int) -> None:
        self.counts["prompt_tokens_total"] += count

    def prefix(self, cached: int, asked: int) -> None:
        """Tokens of a prompt that the prefix cache had, of all it was asked for."""
        self.counts["prefix_cache_hit_tokens_total"] += cached
        self.counts["prefix_cache_query_tokens_total"] += asked

    def images_encoded(self, images: int, tiles: int) -> None:
        self.counts["images_encoded_total"] += images
        self.counts["image_tiles_total"] += tiles

    def images_known(self, images: int) -> None:
        """Images whose tokens the prefix cache had to the last one."""
        self.counts["images_known_total"] += images

    def decode_step(self, rows: int) -> None:
        self.counts["decode_steps_total"] += 1
        self.counts["decode_rows_total"] += rows  # divided by the steps: mean batch

    def occupancy(self, active: int, waiting: int) -> None:
        self.gauges["active_requests"], self.gauges["waiting_requests"] = active, waiting

    def snapshot(self) -> dict[str, list[tuple[str, dict[str, str], float]]]:
        """All values as {"counter" | "gauge": [(name, labels, value)]}; histograms as their Prometheus series."""
        counters: list[tuple[str, dict[str, str], float]] = [(name, {}, value) for name, value in self.counts.items()]
        counters += [("requests_total", {"end": end}, value) for end, value in self.ends.items()]
        for name, histogram in self.histograms.items():
            bounds = [*(f"{bound:g}" for bound in SECONDS), "+Inf"]
            counters += [
                (f"{name}_bucket", {"le": bound}, count) for bound, count in zip(bounds, histogram.buckets, strict=True)
            ]
            counters += [(f"{name}_sum", {}, histogram.total), (f"{name}_count", {}, histogram.buckets[-1])]
        return {"counter": counters, "gauge": [(name, {}, value) for name, value in self.gauges.items()]}
