"""Time by kind of layer of an ONNX Runtime engine, from the runtime's own profile of a separate short run.

Which layer a node belongs to follows from the graph: between the value behind the previous layer and the router logits lies a layer's
attention, with its norm and projections; between the router logits and the value behind the layer lie its experts. What belongs to no
layer or to several (embedding, masks, positions, output head) is the rest.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.config import EngineConfig
from engines.directory import read_config
from engines.errors import EngineError
from engines.onnxruntime.session import OrtSession
from engines.weights import map_weights

KINDS = ("lightning", "softmax", "experts", "rest")
LONGEST = 4096  # tokens of the profiled prompt


class ProfiledSession(OrtSession):
    """An engine that records what every node takes."""

    def _open(self, model: str | bytes, prepack: bool) -> ort.InferenceSession:
        folder = tempfile.mkdtemp(prefix="mxcompile-profile-")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def take_profiles(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Events of the prefill graph and of the decode graph (the same list when there is one graph)."""
        decode = _events(self._session)
        return (decode if self._prefill_session is self._session else _events(self._prefill_session)), decode


def profile(folder: Path, checkpoint: str | None, length: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds by kind: {"prefill_s": {...}, "decode_s": {...}, "prompt_length", "steps"}; for an engine of one rank.

    Raises EngineError where the engine cannot tell.
    """
    config = read_config(folder)
    if config.target != "onnxruntime" or config.mapping.ranks > 1 or not config.taps:
        raise EngineError("only an ONNX Runtime engine of one rank tells its time by layer")
    files = config.ranks[0]
    assert files.weights is not None
    weights = map_weights(folder, config, files.weights, Path(checkpoint) if checkpoint else None, whole=False)
    prefill_graph = folder / files.prefill_graph if files.prefill_graph is not None else None
    session = ProfiledSession(config, folder / files.graph, prefill_graph, weights, threads=threads)
    chunk = config.limits.prefill_chunk
    length = min(length, LONGEST, config.limits.max_seq_len - steps)
    length = length // chunk * chunk if length > chunk else length  # whole chunks: all runs use the prefill graph
    if length < 8:
        raise EngineError("the engine is too short to be profiled")
    random = np.random.default_rng(0)
    prompt = random.integers(0, session.vocab_size, length).tolist()
    for _ in range(2):  # the first is warm-up
        state = session.new_state(1)
        session.prefill([prompt], state)
    for token in random.integers(0, session.vocab_size, steps + 2):
        session.decode([int(token)], state)
    prefill_events, decode_events = session.take_profiles()
    decode_runs = runs(decode_events)
    prefill_runs = decode_runs[: -(steps + 2)] if prefill_events is decode_events else runs(prefill_events)
    measured = prefill_runs[len(prefill_runs) // 2 :]
    kinds = node_kinds(config, folder / files.graph)
    prefill_kinds = kinds if prefill_graph is None else node_kinds(config, prefill_graph)
    by_step = [seconds_by_kind(run, kinds) for run in decode_runs[-steps:]]
    return {
        "prompt_length": length,
        "steps": steps,
        "prefill_s": seconds_by_kind([event for run in measured for event in run], prefill_kinds),
        "decode_s": {kind: statistics.median(step[kind] for step in by_step) for kind in KINDS},
    }


def _events(session: ort.InferenceSession) -> list[dict[str, Any]]:
    path = Path(session.end_profiling())
    try:
        events: list[dict[str, Any]] = json.loads(path.read_bytes())
    finally:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    return events


def runs(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Node events of each run of the graph, in the order of the runs."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    nodes = sorted(
        (e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")), key=lambda e: e["ts"]
    )
    out: list[list[dict[str, Any]]] = [[] for _ in spans]
    index = 0
    for event in nodes:
        while index < len(spans) and event["ts"] > spans[index][1]:
            index += 1
        if index < len(spans) and event["ts"] >= spans[index][0]:
            out[index].append(event)
    return out


def seconds_by_kind(events: Iterable[dict[str, Any]], kinds: dict[str, str]) -> dict[str, float]:
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        # A fused node carries the name of one of its parts, with the fusion's behind a slash.
        seconds[kinds.get(name) or kinds.get(name.split("/")[0], "rest")] += event["dur"] * 1e-6
    return seconds


def node_kinds(config: EngineConfig, graph_file: Path) -> dict[str, str]:
    """Kind by node name."""
    import onnx

    graph = onnx.load(str(graph_file), load_external_data=False).graph
    producer = {output: node for node in graph.node for output in node.output}
    hidden, router = config.taps[0::2], config.taps[1::2]
    if any(tap not in producer for tap in config.taps) or not all(name.endswith("hidden") for name in hidden):
        raise EngineError("the graph does not name its layers")
    layer_kinds = config.model["layer_kinds"]
    stream = _behind_embedding(graph)
    kinds: dict[str, str] = {}
    owners: dict[str, set[int]] = defaultdict(set)
    before: set[str] = set()
    for layer, (behind, logits) in enumerate(zip(hidden, router, strict=True)):
        attention = _ancestors(producer, logits, stop=before)
        experts = _ancestors(producer, behind, stop=before | {logits})
        for name in attention:
            kinds[name] = layer_kinds[layer]
        for name in experts - attention:
            kinds[name] = "experts"
        for name in attention | experts:
            owners[name].add(layer)
        before = {behind}
    return {name: kind for name, kind in kinds.items() if len(owners[name]) == 1 and name in stream}


def _ancestors(producer: dict[str, Any], value: str, stop: set[str]) -> set[str]:
    """Names of the nodes that `value` is computed from, up to the values `stop`."""
    found: set[str] = set()
    queue, seen = [value], set(stop)
    while queue:
        name = queue.pop()
        if name in seen or name not in producer:
            continue
        seen.add(name)
        found.add(producer[name].name)
        queue += producer[name].input
    return found


def _behind_embedding(graph: Any) -> set[str]:
    """Names of the nodes that depend on embedded tokens: masks, positions and lengths do not."""
    reached: set[str] = set()
    names: set[str] = set()
    for node in graph.node:  # topological order
        if node.op_type == "Gather" and any("embed" in name for name in node.input):
            reached |= set(node.output)
        elif any(name in reached for name in node.input):
            reached |= set(node.output)
            names.add(node.name)
    return names
