"""What files of results say of the engine, its checkpoint and the machine, as far as reports read it; see `strict_records`.

Other keys may be there: what a newer engine tells of itself is carried along.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from mxcompile.strict_records import Count, NotNegative, Whole


class CheckpointFacts(TypedDict, total=False):
    """Which checkpoint, and where it lay."""

    path: str
    fingerprint: str
    moved: bool
    layers: Count


class EngineFacts(TypedDict, total=False):
    """Which engine."""

    path: str
    digest: str
    target: str
    dtype: str
    quantization: dict[str, Any] | None
    layers: Whole
    ranks: Count
    max_seq_len: Count
    model: dict[str, Any] | None


class EnvironmentFacts(TypedDict, total=False):
    """Which machine, and how busy it was."""

    cpu: str
    cores: Count
    memory_total: Whole | None
    system: str
    python: str
    commit: str | None
    threads: Count | None
    libraries: dict[str, str]
    load_average_before: list[NotNegative]
    load_average_after: list[NotNegative]


CheckpointPart = Annotated[dict[str, Any], CheckpointFacts]
EnginePart = Annotated[dict[str, Any], EngineFacts]
EnvironmentPart = Annotated[dict[str, Any], EnvironmentFacts]
