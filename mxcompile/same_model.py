"""Whether two configurations are one model: what decides shapes and numbers must be equal, names and limits need not."""

from __future__ import annotations

from typing import Any

_NOT_NUMERICS = {"family", "tensor_prefix", "bos_token_id", "eos_token_id", "max_position_embeddings"}


def first_difference(engine: dict[str, Any], other: dict[str, Any], what: str) -> str | None:
    """The first key that differs, with both values, or None. `what`: the name of the other side in the text.

    A vision half that only one side has is no difference: the text model does not depend on it.
    """
    for key in sorted((set(engine) | set(other)) - _NOT_NUMERICS):
        if key == "vision" and not (engine.get(key) and other.get(key)):
            continue
        if engine.get(key) != other.get(key):
            return f"{key} is {engine.get(key)!r} in the engine and {other.get(key)!r} in {what}"
    return None
