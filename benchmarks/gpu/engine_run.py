"""The first run of engines on a GPU: builds, validates and benchmarks them, a process and a limit per step, one JSON file whatever happens.

    python3 benchmarks/gpu/engine_run.py prepare FOLDER         anywhere: traces the graphs, so that the GPU's machine need not
    python3 benchmarks/gpu/engine_run.py run FOLDER --library DIR --results DIR
    python3 benchmarks/gpu/engine_run.py rehearse FOLDER        without a GPU: the same steps with `tiny` and ONNX Runtime on the CPU

`tiny`, `small` and `pair` (one lightning and one softmax layer of text-01's width, 8 of its 32 experts, a small vocabulary) for the targets
tensorrt-rtx, tensorrt and onnxruntime with its CUDA provider (float32 and bfloat16), as far as their Python modules are there.
TensorRT-RTX names no Hopper: there it is asked to compile for the GPU at hand, whatever that is. Results in gpu-engines.json, replaced
after every step; what the steps print in gpu-engines.log. Exit code 0; 1 where a step failed; 3 where there is no GPU or nothing to run.
docs/gpu-runs.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from run import SECONDS, gpu_facts, tail, write  # noqa: E402

from plugins.errors import PluginsError  # noqa: E402

MODELS = ("tiny", "small", "pair")
# What is run: target, its Python module, and the type of its engines. ONNX Runtime's float32 engine is for the eye (its limits are the
# tight ones), the bfloat16 one for the clock.
TARGETS = {
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx", "bfloat16"),
    "tensorrt": ("tensorrt", "tensorrt", "bfloat16"),
    "onnxruntime": ("onnxruntime", "onnxruntime", "float32"),
    "onnxruntime-bf16": ("onnxruntime", "onnxruntime", "bfloat16"),
}
LEFT_OUT = {("pair", "onnxruntime"): "13 GB of weights; onnxruntime-bf16 reads the checkpoint's own"}
LIMITS = {"node": 60.0, "checkpoint": 120.0, "build": 120.0, "validate": 100.0, "bench": 60.0}  # most seconds of a step
LEAST = 10.0  # a step with less time left is not begun
SHAPES = [
    "--prompt-lengths",
    "128,1k",
    "--batch-sizes",
    "1,4",
    "--new-tokens",
    "32",
    "--repeats",
    "3",
    "--no-layer-times",
]
VERSIONS = (
    "import importlib, importlib.metadata, json, sys; found = {}\n"
    "for name in sys.argv[1:]:\n"
    "    try: module = importlib.import_module(name); found[name] = str(module.__version__)\n"
    "    except Exception as error: found[name] = f'not there: {type(error).__name__}: {error}'[:300]\n"
    "    if name == 'onnxruntime' and 'not there' not in found[name]: found['providers'] = module.get_available_providers()\n"
    "print(json.dumps(found))"
)


def config_of(model: str) -> Any:
    """The ModelConfig of one of MODELS."""
    from model_defs.presets import preset

    if model != "pair":
        return preset(model)
    small = {"vocab_size": 1024, "bos_token_id": None, "eos_token_id": None, "num_local_experts": 8}
    return dataclasses.replace(preset("text-01"), layer_kinds=("lightning", "softmax"), slope_layers=2, **small)


def prepare(folder: Path, models: tuple[str, ...]) -> None:
    """Write the canonical graphs of all models in all types that targets want."""
    from export.save import save_graph
    from mxcompile.exporting import graph

    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        for dtype in sorted({dtype for _, _, dtype in TARGETS.values()}):
            save_graph(graph(config_of(model), dtype), folder / f"{model}-{dtype}.onnx", force=True)
            print(f"{folder / f'{model}-{dtype}.onnx'}", flush=True)


def checkpoint(folder: Path, model: str) -> None:
    """Write the model's checkpoint, with random weights."""
    from model_defs.checkpoint.create import create_checkpoint

    create_checkpoint(
        config_of(model), folder / model, with_tokenizer=model != "pair"
    )  # none has so small a vocabulary


def build_engine(folder: Path, model: str, target: str, device: str) -> None:
    """Build one engine from a prepared graph, as `mxcompile build` does from one that it traces."""
    import onnx_ir as ir

    import engines.tensorrt.build as tensorrt_build
    from engines.tensorrt.device import compute_capability
    from engines.tensorrt.gpus import GPUS
    from mxcompile import building, exporting, tensorrt_building

    def graph(config: Any, dtype: str) -> ir.Model:
        return ir.load(folder / f"{model}-{dtype}.onnx")

    for module in (building, exporting, tensorrt_building):
        if hasattr(module, "graph"):
            module.graph = graph  # type: ignore[attr-defined]
    options: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 2048, "prefill_chunk": 512, "force": True}
    run, (target, _, dtype) = target, TARGETS[target]
    options["dtype"] = dtype
    if target == "onnxruntime":
        options |= {"device": device, "target": target}
    else:
        found = compute_capability()
        gpu = next((gpu for gpu in GPUS.values() if gpu.capability == found), None)
        if gpu is None:
            raise SystemExit(f"no GPU of compute capability {found} is known")
        if target not in gpu.targets:
            GPUS[gpu.name] = dataclasses.replace(gpu, targets=(*gpu.targets, target))
            tensorrt_build.aim_at = _aim_at_this  # type: ignore[assignment]
        options |= {"target": target, "gpu": gpu.name, "strip_weights": True, "taps": model == "tiny"}
    summary = building.build(folder / model, folder / f"{model}-{run}", **options)
    print(json.dumps(summary.to_dict()))


def one_node() -> None:
    """Run one addition with ONNX Runtime's CUDA provider and say where it ran; a traceback says what is missing."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    from engines.onnxruntime.devices import providers

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "one", value[:2], value[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    print(onnxruntime.__version__, onnxruntime.__file__, onnxruntime.get_available_providers(), flush=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers("cuda"))
    ones_4 = np.ones(4, np.float32)
    (found,) = session.run(None, {"a": ones_4, "b": ones_4})
    print(session.get_providers(), session.get_provider_options(), found.tolist(), flush=True)
    if "CUDAExecutionProvider" not in session.get_providers() or found.tolist() != [2.0] * 4:
        raise SystemExit("ONNX Runtime's CUDA provider did not start, or adds wrongly")


def _aim_at_this(trt: Any, builder_config: Any, gpu: Any, target: str) -> None:
    """Let TensorRT-RTX compile for the GPU at hand, which it has no name for."""
    builder_config.num_compute_capabilities = 1
    builder_config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


class Runner:
    """Runs steps one after the other and keeps what came of each in `report["steps"]`, which `target` always holds."""

    def __init__(self, about: dict[str, Any], target: Path, seconds: float, env: dict[str, str] | None = None) -> None:
        self.report: dict[str, Any] = {**about, "steps": {}}
        self._target, self._log, self._env = target, target.with_suffix(".log"), env
        self._deadline = time.monotonic() + seconds
        self._log.unlink(missing_ok=True)
        write(target, self.report)

    def step(self, name: str, command: list[str], limit: float, result: Path | None = None) -> bool:
        """Whether `command` ended with 0 within `limit` seconds. `result`: a JSON file that it writes, kept in the report."""
        left = self._deadline - time.monotonic()
        if left < LEAST:
            return self.skip(name, "out of time")
        if result is not None:
            result.unlink(missing_ok=True)
        began = time.monotonic()
        with self._log.open("ab") as log:
            log.write(f"\n==== {name}: {' '.join(command)}\n".encode())
            log.flush()
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self._env, start_new_session=True
            )
            try:
                code: int | None = child.wait(timeout=min(limit, left))
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        record: dict[str, Any] = {
            "outcome": "passed" if code == 0 else "hung" if code is None else "failed",
            "exit_code": code,
            "seconds": round(time.monotonic() - began, 1),
        }
        if code != 0:
            record["said"] = tail(self._log)
        if result is not None and result.is_file():
            try:
                record["result"] = json.loads(result.read_text())
            except ValueError as error:
                record["result"] = f"not JSON: {error}"
        self._keep(name, record)
        return code == 0

    def skip(self, name: str, why: str) -> bool:
        """Record that a step was not run."""
        self._keep(name, {"outcome": f"not run: {why}"})
        return False

    def _keep(self, name: str, record: dict[str, Any]) -> None:
        self.report["steps"][name] = record
        write(self._target, self.report)
        print(f"{name}: {record['outcome']} {record.get('seconds', '')}", flush=True)

    @property
    def clean(self) -> bool:
        return all(record["outcome"] == "passed" for record in self.report["steps"].values())


def run_engines(
    runner: Runner, folder: Path, models: tuple[str, ...], targets: dict[str, str], device: str, scratch: Path
) -> None:
    """All steps. `targets`: those to run, and why one cannot be ("" where it can)."""
    this = [sys.executable, str(Path(__file__).resolve())]
    cli = [sys.executable, "-m", "mxcompile"]
    if targets.get("tensorrt") == "":
        runner.step("tensorrt: calls", [sys.executable, "tests/trt/tensorrt_calls.py", "tensorrt"], 60)
    ours = [target for target, why in targets.items() if TARGETS[target][0] == "onnxruntime" and not why]
    command = [*this, "node", str(folder)]
    if device == "cuda" and ours and not runner.step("onnxruntime: one node on CUDA", command, LIMITS["node"]):
        targets = targets | dict.fromkeys(ours, "one node did not run on CUDA")
    for model in models:
        kept = folder / model
        there = (kept / "config.json").is_file()
        there = there or runner.step(
            f"{model}: checkpoint", [*this, "checkpoint", str(folder), "--model", model], LIMITS["checkpoint"]
        )
        for target, missing in targets.items():
            name, engine, result = f"{model}, {target}", folder / f"{model}-{target}", scratch / "result.json"
            if why := missing or LEFT_OUT.get((model, target), "" if there else "there is no checkpoint"):
                runner.skip(name, why)
                continue
            command = [*this, "build", str(folder), "--model", model, "--target", target, "--device", device]
            if not runner.step(f"{name}: build", command, LIMITS["build"]):
                continue
            checks = [*cli, "validate", str(engine), "--against", str(kept), "--quick", "--json", str(result)]
            checks += ["--lengths", "1,65,300"] if model == "pair" else []
            runner.step(f"{name}: validate", checks, LIMITS["validate"], result)
            times = [*cli, "bench", str(engine), *SHAPES, "--limit", "20", "--json", str(result)]
            runner.step(f"{name}: bench", times, LIMITS["bench"], result)


def versions() -> dict[str, Any]:
    """Of the modules that steps need, or why one is not there."""
    names = ("tensorrt_rtx", "tensorrt", "onnxruntime", "cuda.bindings", "torch", "onnx", "onnx_ir", "numpy")
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in names:  # each in its own process: one that crashes is one that is not there
        done = subprocess.run([sys.executable, "-c", VERSIONS, name], capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        found |= (
            json.loads(lines[-1]) if done.returncode == 0 and lines else {name: f"not there: code {done.returncode}"}
        )
    return found


def missing(target: str, found: dict[str, Any], device: str) -> str:
    """Why a target cannot run; "" where nothing is known to be in the way."""
    wanted, module, _ = TARGETS[target]
    version = str(found.get(module, "not there"))
    if version.startswith("not there"):
        return f"{module}: {version}"
    if wanted == "onnxruntime" and device == "cuda" and "CUDAExecutionProvider" not in found.get("providers", []):
        return "this onnxruntime has no CUDA provider; install onnxruntime-gpu"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "rehearse", "checkpoint", "build", "node"])
    parser.add_argument("folder", type=Path, help="of graphs, checkpoints and engines")
    parser.add_argument("--library", type=Path, metavar="DIR", help="build folder of the plugin library for this GPU")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR", help="(%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything (%(default).0f)")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; default: all")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; default: all")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = tuple(options.model or MODELS)
    if options.what == "prepare":
        prepare(options.folder, models)
        return 0
    if options.what == "checkpoint":
        checkpoint(options.folder, models[0])
        return 0
    if options.what == "node":
        one_node()
        return 0
    if options.what == "build":
        build_engine(options.folder, models[0], options.target[0], options.device)
        return 0
    begun = time.monotonic()
    rehearsal = options.what == "rehearse"
    try:
        hardware = {"name": "none: a rehearsal"} if rehearsal else gpu_facts()
    except PluginsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    device = "cpu" if rehearsal else options.device
    wanted = ["onnxruntime"] if rehearsal else options.target or list(TARGETS)
    models = models[:1] if rehearsal else models
    folder = options.folder.absolute()
    if lacking := [model for model in models if not list(folder.glob(f"{model}-*.onnx"))]:
        print(f"error: no graph of {', '.join(lacking)} in {folder}; run prepare first", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    found = versions()
    targets = {target: missing(target, found, device) for target in wanted}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if options.library is not None:
        env["MXCOMPILE_PLUGINS_DIR"] = str(options.library.absolute())
    about = {"hardware": hardware, "versions": found, "date": datetime.datetime.now(datetime.UTC).isoformat()}
    left = options.seconds - (time.monotonic() - begun)
    runner = Runner(about, options.results.absolute() / "gpu-engines.json", left, env)
    run_engines(runner, folder, models, targets, device, folder)
    if all(targets.values()):
        print("error: no target can run here", file=sys.stderr)
        return 3
    return 0 if runner.clean else 1


if __name__ == "__main__":
    sys.exit(main())
