"""Checks that a checkpoint holds exactly the tensors that its configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_defs.checkpoint.names import expected_tensors, ignorable, layer_of
from model_defs.checkpoint.processor import PREPROCESSOR_FILE, read_processing
from model_defs.checkpoint.reader import Checkpoint, Problem
from model_defs.config import ModelConfig
from model_defs.errors import CheckpointError, ConfigError

OnProgress = Callable[[int, int, str], None]  # bytes done, bytes in all, tensor just done

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")

_SCAN_ELEMENTS = 8 << 20  # elements looked at in one go: bounds the memory of a scan to some 16 MB
_EXPONENT_BITS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF << 52),
}


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `problems` is empty exactly when the checkpoint is sound."""

    problems: tuple[Problem, ...]
    tensors_checked: int  # tensors that the model needs and the checkpoint has
    tensors_ignored: int  # known and rightly unused ones
    bytes_scanned: int  # bytes whose values were looked at; 0 without a scan

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    checkpoint: Checkpoint,
    on_progress: OnProgress | None = None,
    *,
    config: ModelConfig | None = None,
    scan_values: bool = False,
) -> VerifyReport:
    """Compares the checkpoint with `config` (its own by default; a truncated one asks for its first layers only).

    Open the checkpoint with `strict=False` to see all problems of its files here. With `scan_values` every needed
    tensor is read, a piece at a time, and one with a NaN, an infinity or nothing but zeros (a hole in a download) is
    reported. `on_progress(bytes done, bytes in all, tensor name)` is called after each tensor.
    """
    config = config or checkpoint.config
    expected = expected_tensors(config)
    problems = list(checkpoint.problems)
    problems += _presence_problems(checkpoint, config, expected)
    if config.vision is not None:
        try:
            read_processing(checkpoint.folder, config.vision)
        except ConfigError as error:
            text = str(error).removeprefix(f"{checkpoint.folder / PREPROCESSOR_FILE}: ")
            problems.append(Problem("preprocessor", PREPROCESSOR_FILE, f"{PREPROCESSOR_FILE}: {text}"))
    present = [checkpoint.entries[name] for name in expected if name in checkpoint.entries]
    total = sum(entry.nbytes for entry in present)
    done = 0
    for entry in present:
        if scan_values and entry.dtype in _EXPONENT_BITS:
            fault = _value_fault(checkpoint.array(entry.name), entry.dtype)
            if fault:
                problems.append(Problem("values", entry.name, f"tensor {entry.name} in {entry.file.name} {fault}"))
        done += entry.nbytes
        if on_progress:
            on_progress(done, total, entry.name)
    ignored = sum(_ignorable(name, config) for name in checkpoint.entries if name not in expected)
    return VerifyReport(tuple(problems), len(present), ignored, done if scan_values else 0)


def require_complete(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises CheckpointError with the first problems and their number unless every tensor of `config` is there, of the
    right shape and type, and none that it should know is left over.
    """
    problems = _presence_problems(checkpoint, config, expected_tensors(config))
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:3])
        more = f"; and {len(problems) - 3} more problems" if len(problems) > 3 else ""
        raise CheckpointError(f"checkpoint {checkpoint.folder} does not fit its configuration: {shown}{more}")


def _presence_problems(
    checkpoint: Checkpoint, config: ModelConfig, expected: dict[str, tuple[int, ...]]
) -> list[Problem]:
    problems = []
    for name, shape in expected.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            problems.append(Problem("missing", name, f"tensor {name} is missing"))
            continue
        where = f"tensor {name} in {entry.file.name}"
        if entry.shape != shape:
            message = f"{where} has shape {list(entry.shape)}, the configuration asks for {list(shape)}"
            problems.append(Problem("shape", name, message))
        if entry.dtype not in FLOAT_DTYPES:
            message = f"{where} has dtype {entry.dtype}, must be one of {', '.join(FLOAT_DTYPES)}"
            problems.append(Problem("dtype", name, message))
    for name, entry in checkpoint.entries.items():
        if name not in expected and not _ignorable(name, config) and not _beyond_cut(name, config):
            message = f"tensor {name} in {entry.file.name} is unexpected: the configuration has no place for it"
            problems.append(Problem("unexpected", name, message))
    return problems


def _ignorable(name: str, config: ModelConfig) -> bool:
    return ignorable(name, config.tensor_prefix, config.vision is not None)


def _beyond_cut(name: str, config: ModelConfig) -> bool:
    """Whether the tensor is of a layer that the full model has and this truncated one leaves out."""
    layer = layer_of(name)
    return layer is not None and config.num_layers <= layer < config.slope_layers


def _value_fault(values: NDArray, dtype: str) -> str | None:
    bits, exponent = _EXPONENT_BITS[dtype]
    flat = values.reshape(-1).view(bits)
    nonzero = False
    for start in range(0, flat.size, _SCAN_ELEMENTS):
        piece = flat[start : start + _SCAN_ELEMENTS]
        # NaN and infinity are the values whose exponent bits are all set; this needs no arithmetic in 16-bit types.
        bad = int(np.count_nonzero((piece & exponent) == exponent))
        if bad:
            return f"has NaN or infinite values (at least {bad})"
        nonzero = nonzero or bool(piece.any())
    return None if nonzero or not flat.size else "is all zeros"
