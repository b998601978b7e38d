"""Engines of several ranks, really executed, against the engine of one rank and against PyTorch; numbers of agreement, no times.

    python benchmarks/parallel_matrix.py --json benchmarks/results/parallel_matrix.json

For every preset and mapping: build, start the ranks, and run everything that `mxcompile validate` runs (prompts of 1 to 1000 tokens,
ragged batches, prefill in chunks, token by token, three times 200 greedy tokens; logits and gathered states) against the engine of one
rank in place of the reference; then the quick form of it against the PyTorch definition, or all of it with --whole. Limits and near-ties
of the router are `validate`'s: a tie is named in the result, never left out. Exits with 1 when anything disagrees. What the JSON file has
already is kept, so that a run of hours can be continued.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

MAPPINGS = ("2,2,1", "2,1,2", "4,4,1", "4,1,4", "4,2,2")
REFERENCES = ("against_one_rank", "against_pytorch")
MAX_SEQ_LEN = 1536  # the longest prompt of a validation, and what is decoded behind it


def check_mapping(
    checkpoint: Path, alone: Any, folder: Path, sizes: Sequence[int], options: Any, whole: bool
) -> dict[str, Any]:
    """Build the engine of one mapping and hold it against both references."""
    from engines import load
    from mxcompile.building import build
    from mxcompile.validation import validate

    tp_size, moe_tp_size, moe_ep_size = sizes
    engine = folder / "engine-{}-{}-{}".format(*sizes)
    build(
        checkpoint,
        engine,
        max_seq_len=MAX_SEQ_LEN,
        tp_size=tp_size,
        moe_tp_size=moe_tp_size,
        moe_ep_size=moe_ep_size,
        threads=options.threads,
        force=True,
    )
    session = load(engine, threads=options.threads)
    try:
        return {
            "tp_size": tp_size,
            "moe_tp_size": moe_tp_size,
            "moe_ep_size": moe_ep_size,
            "against_one_rank": summary(validate(session, alone, options)),
            "against_pytorch": summary(validate(session, checkpoint, replace(options, quick=not whole))),
        }
    finally:
        session.close()  # type: ignore[attr-defined]


def summary(report: Any) -> dict[str, Any]:
    """What counts of a validation report: the worst of every measure, every greedy run, every tie."""
    worst: dict[str, dict[str, Any]] = {}
    for check in report.checks:
        for measure in check.measures:
            known = worst.get(measure.name)
            if known is None or measure.strain > known["strain"]:
                worst[measure.name] = {
                    "strain": measure.strain,
                    "value": measure.value,
                    "limit": measure.limit,
                    "where": f"{check.group.replace(' against PyTorch', '')}, {check.case}, {measure.where}",
                }
    return {
        "passed": report.passed,
        "quick": report.options["quick"],
        "checks": len(report.checks),
        "failed": [f"{check.group}, {check.case}" for check in report.failed],
        "inconclusive": [f"{check.group}, {check.case}" for check in report.inconclusive],
        "positions_compared": sum(check.compared for check in report.checks),
        "positions_judged": sum(check.judged for check in report.checks),
        "logit_scale": report.logit_scale,
        "worst": {name: {k: v for k, v in item.items() if k != "strain"} for name, item in worst.items()},
        "greedy": [
            {
                "prompt_tokens": run.prompt_tokens,
                "tokens": run.tokens,
                "identical": sum(run.agreed),
                "until_first_difference": run.own_agreed,
                "explanation": run.explanation,
            }
            for run in report.greedy
        ],
        "router_ties": [vars(tie) for tie in report.reroutes],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="of the checkpoint; repeatable  [default: tiny, small]")
    parser.add_argument("--mapping", action="append", help="TP,MOE_TP,MOE_EP; repeatable  [default: 2 and 4 ranks]")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter prompts, 50 greedy tokens")
    parser.add_argument("--whole", action="store_true", help="all comparisons against PyTorch too")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together, and of the references")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoint and of the prompts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from engines import load
    from mxcompile.building import build
    from mxcompile.checkpoints import create_checkpoint
    from mxcompile.validation import ValidationOptions

    mappings = [tuple(int(size) for size in text.split(",")) for text in arguments.mapping or MAPPINGS]
    if any(len(sizes) != 3 for sizes in mappings):
        parser.error("a mapping has three sizes: TP,MOE_TP,MOE_EP")
    options = ValidationOptions(quick=arguments.quick, seed=arguments.seed, threads=arguments.threads)
    result: dict[str, Any] = {
        "benchmark": "parallel_matrix",
        "date": date.today().isoformat(),
        "machine": {"cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "torch", "mpi4py", "openmpi")},
        "seed": arguments.seed,
        "presets": {},
    }
    if arguments.json is not None and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        if any(before[key] != result[key] for key in ("versions", "seed")):
            parser.error(f"{arguments.json} is of another seed or of other versions; remove it or write elsewhere")
        result["presets"] = before["presets"]
    for preset in arguments.preset or ("tiny", "small"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            checkpoint = folder / "checkpoint"
            create_checkpoint(preset, checkpoint, seed=arguments.seed, dtype="float32")
            build(checkpoint, folder / "engine", max_seq_len=MAX_SEQ_LEN, threads=arguments.threads)
            alone = load(folder / "engine", threads=arguments.threads)
            found = result["presets"].setdefault(preset, [])
            for sizes in mappings:
                if any((one["tp_size"], one["moe_tp_size"], one["moe_ep_size"]) == sizes for one in found):
                    continue
                found.append(check_mapping(checkpoint, alone, folder, sizes, options, arguments.whole))
                text = ["agrees" if found[-1][name]["passed"] else "DISAGREES" for name in REFERENCES]
                print(f"{preset} {sizes}: {text[0]} with one rank, {text[1]} with PyTorch", file=sys.stderr, flush=True)
                if arguments.json:
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    agreed = all(one[name]["passed"] for every in result["presets"].values() for one in every for name in REFERENCES)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
