"""Memory of a process and its children, from /proc; and what a cell will need."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

ROOM = 0.9  # of the available memory that a cell may be expected to take


def reset_peak() -> None:
    """Let the peak of this process and its children start again from what they hold now (proc(5), clear_refs)."""
    for pid in _family():
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident size since `reset_peak`: the sum over this process and its children (ranks), mapped weights included."""
    return sum(_status(pid, "VmHWM") for pid in _family())


def resident_bytes() -> int:
    """Resident size now, likewise."""
    return sum(_status(pid, "VmRSS") for pid in _family())


def available_bytes() -> int | None:
    """Memory that the machine can still give, or None where that cannot be told."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def load_bytes(model: dict[str, Any], backend: str, element: int) -> int:
    """About what loading takes: the weights, twice for an engine, whose runtime keeps rearranged copies."""
    from model_defs.config import ModelConfig

    weights = sum(ModelConfig.from_dict(model).parameter_counts().values()) * element
    return weights * (2 if backend == "engine" else 1)


def cell_bytes(
    model: dict[str, Any], backend: str, element: int, chunk: int, batch: int, length: int, new_tokens: int
) -> int:
    """About what one cell takes beside the weights: states, cache (twice while it grows), activations and attention scores.

    transformers reads the prompt whole and holds a mask of prompt by prompt; the others read chunks.
    """
    from model_defs.config import ModelConfig

    config = ModelConfig.from_dict(model)
    total = length + new_tokens
    state = batch * 4 * config.state_elements_per_sequence()
    cache = 2 * batch * total * config.cache_elements_per_token() * element
    at_once = length if backend == "transformers" else min(chunk, length)
    per_token = 8 * config.hidden_size + 8 * config.attention_width
    per_token += config.num_experts_per_tok * 3 * config.intermediate_size
    activations = batch * at_once * per_token * 4
    scores = batch * at_once * total * (1 if backend == "transformers" else 4 * config.num_attention_heads)
    return state + cache + activations + (scores if config.softmax_layers else 0) + batch * config.vocab_size * 8


def _family() -> list[int]:
    """This process and all its descendants."""
    found, queue = [], [_own()]
    while queue:
        pid = queue.pop()
        found.append(pid)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    queue += [int(child) for child in (task / "children").read_text().split()]
    return found


def _own() -> int:
    import os

    return os.getpid()


def _status(pid: int, key: str) -> int:
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
