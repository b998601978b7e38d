"""Do two runs of `mxcompile bench` on this machine agree within the spread they state (docs/reports.md, "Do two runs agree?")?

    python benchmarks/bench_agreement.py demo/engine --json benchmarks/results/bench_agreement.json

Runs the benchmark several times with the same options and compares each run with the first. By the stated rate, `changed_by_chance` of
`numbers` differ although nothing changed; more than that means that the runs differ in what the passes of one run do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

from mxcompile.bench.options import BenchOptions
from mxcompile.bench.run import bench
from mxcompile.cli.progress_bars import progress
from mxcompile.report.comparison import AGREEING, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--backend", action="append", choices=["engine", "pytorch", "transformers"])
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    options = BenchOptions(
        prompt_lengths=tuple(given.prompt_lengths),
        batch_sizes=tuple(given.batch_sizes),
        new_tokens=given.new_tokens,
        repeats=given.repeats,
        backends=tuple(given.backend or ("engine", "pytorch")),
        layer_times=False,
    )
    with progress(verbose=True) as shown:
        runs = [
            bench(given.engine, options, progress=shown, announce=lambda text: print(text, file=sys.stderr))
            for _ in range(given.runs)
        ]
    compared = [compare(benches=[("new", run)], baseline=("first", runs[0]))["baseline"] for run in runs[1:]]
    report = {
        "benchmark": "bench_agreement",
        "date": date.today().isoformat(),
        "environment": runs[0].environment,
        "options": options.to_dict(),
        "numbers": sum(item["numbers"] for item in compared),
        "changed": sum(item["changed"] for item in compared),
        "changed_by_chance": round(sum(item["changed_by_chance"] for item in compared), 2),
        "compared": list(AGREEING),
        "runs": [item["rows"] for item in compared],
    }
    text = json.dumps(report, indent=1)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n")
    for key in ("numbers", "changed", "changed_by_chance"):
        print(f"{key}: {report[key]}")


if __name__ == "__main__":
    main()
