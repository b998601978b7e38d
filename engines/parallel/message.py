"""Messages between the session and its ranks: a JSON object whose arrays follow as raw bytes. Nothing in a message can run code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """Bytes of a message; arrays may stand at the top level or in a dictionary there."""
    arrays: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value).tobytes())
            return {"array": value.dtype.str, "shape": value.shape, "bytes": len(arrays[-1])}
        if isinstance(value, dict):
            return {"dict": [[key, plain(item)] for key, item in value.items()]}
        return {"plain": value}

    header = json.dumps({key: plain(value) for key, value in message.items()}).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *arrays])


def decode(data: bytes) -> Message:
    """Inverse of `encode`; arrays are writable copies."""
    length = int.from_bytes(data[:8], "little")
    position = 8 + length

    def value(item: dict[str, Any]) -> Any:
        nonlocal position
        if "array" in item:
            start, position = position, position + item["bytes"]
            return np.frombuffer(data[start:position], np.dtype(item["array"])).reshape(item["shape"]).copy()
        if "dict" in item:
            return {key: value(inner) for key, inner in item["dict"]}
        return item["plain"]

    return {key: value(item) for key, item in json.loads(data[8 : 8 + length]).items()}
