"""The pieces of one rank's graph as a file: `rank{r}.pieces`, and `rank{r}.prefill.pieces` of its graph for several tokens.

Eight bytes that name the format, the length of a JSON header (8 bytes, little-endian), the header, then one ONNX model per piece.
The header says between which pieces what is exchanged, and which build and rank the file belongs to. Reading needs no onnx.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.directory import os_errors
from engines.errors import EngineError

MAGIC = b"MXCPIECE"
DIMS = ("batch", "tokens", "segment", "positions")  # named dimensions that an exchanged value may have
OPERATIONS = ("all_reduce", "all_gather")
_MAX_HEADER = 64 << 20


@dataclass(frozen=True)
class Exchange:
    """What the ranks exchange behind a piece: value `source` goes in, value `result` comes out, both float32.

    all_reduce: the sum over the ranks, same shape. all_gather: the ranks' values one behind the other along axis 0.
    """

    operation: str
    source: str
    result: str
    dims: list[int | str]  # of source
    group: list[int] = field(default_factory=list)  # the ranks that take part; empty: all


@dataclass(frozen=True)
class Piece:
    """One part of the graph; `size` bytes of ONNX at `offset` of the file's body. A piece without nodes has size 0."""

    offset: int
    size: int
    inputs: list[str]
    outputs: list[str]
    weights: list[str]
    exchange: Exchange | None  # None behind the last piece


@dataclass(frozen=True)
class PieceFile:
    """Everything about a rank's pieces but the models."""

    rank: int
    ranks: int
    build: str  # the same for all ranks of one build
    pieces: list[Piece]


def pieces_name(graph: str) -> str:
    """Name of the file, in the engine directory, with the pieces of a graph of this name."""
    return f"{graph.removesuffix('.onnx')}.pieces"


def to_bytes(content: PieceFile, models: list[bytes]) -> bytes:
    """The whole file."""
    header = json.dumps(dataclasses.asdict(content)).encode()
    return MAGIC + len(header).to_bytes(8, "little") + header + b"".join(models)


def read(path: Path) -> tuple[PieceFile, list[bytes]]:
    """The header, and one serialized model per piece (empty for an empty piece). Raises EngineError for a damaged file."""
    with os_errors(f"reading {path}"):
        data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    if data[:8] != MAGIC or length > min(len(data) - 16, _MAX_HEADER):
        raise EngineError(f"{path}: not a file of graph pieces; rebuild the engine")
    body = memoryview(data)[16 + length :]
    try:
        content = _parse(json.loads(data[16 : 16 + length]))
        models = []
        for piece in content.pieces:
            if not 0 <= piece.offset <= piece.offset + piece.size <= len(body):
                raise ValueError("a piece lies outside the file")
            models.append(bytes(body[piece.offset : piece.offset + piece.size]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{path}: the pieces cannot be understood ({error}); rebuild the engine") from None
    return content, models


def _parse(raw: dict[str, Any]) -> PieceFile:
    pieces = []
    for item in raw["pieces"]:
        exchange = None if item["exchange"] is None else Exchange(**item["exchange"])
        if exchange is not None:
            known = all(dim in DIMS or (type(dim) is int and dim >= 0) for dim in exchange.dims)
            known &= all(type(rank) is int and 0 <= rank < raw["ranks"] for rank in exchange.group)
            if exchange.operation not in OPERATIONS or not known:
                raise ValueError("an unknown exchange")
        pieces.append(Piece(**(item | {"exchange": exchange})))
    if not pieces or any((piece.exchange is None) != (piece is pieces[-1]) for piece in pieces):
        raise ValueError("pieces and exchanges do not alternate")
    return PieceFile(raw["rank"], raw["ranks"], raw["build"], pieces)


def replace_outputs(piece: Piece, outputs: list[str]) -> Piece:
    """The piece with other outputs."""
    return dataclasses.replace(piece, outputs=outputs)
