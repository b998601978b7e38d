"""Does the recurrent state drift over long decodes? 100,000 tokens one by one, against fp64 and against PyTorch (docs/reports.md).

    python benchmarks/state_drift.py --json benchmarks/results/state_drift_tiny.json

The preset's positions are raised where they are fewer than the tokens; nothing else of the model depends on them. About ten milliseconds
a token on two cores for `tiny`. Ctrl-C keeps what was measured in the file; the same command with --resume and --folder goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path

import mxcompile
from model_defs.checkpoint.create import create_checkpoint
from model_defs.presets import preset
from mxcompile.bench.drift import drift
from mxcompile.bench.drift_results import print_drift
from mxcompile.cli.progress_bars import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 3000, 10000, 30000, 100000])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="keep checkpoint and engine here, or take them from here")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = preset(options.preset)
    longest = max(options.steps)
    config = dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, longest))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        checkpoint, engine = folder / "checkpoint", folder / "engine"
        if not checkpoint.exists():
            create_checkpoint(config, checkpoint, seed=0)
        if not engine.exists():
            mxcompile.build(checkpoint, engine, max_seq_len=longest, max_batch_size=1, threads=options.threads)
        with progress(verbose=True) as shown:
            report = drift(
                engine,
                checkpoint,
                options.steps,
                threads=options.threads,
                json_file=options.json,
                resume=options.resume,
                progress=shown,
            )
    print_drift(report)
    raise SystemExit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
