"""The engine directory's `config.json` as dataclasses, read strictly.

Unknown schema versions, unknown or missing keys and wrong types are one EngineError that names the key: a
configuration that is half understood must never run.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.errors import EngineError

SCHEMA_VERSION = 1

Kind = Literal["lightning", "softmax"]

_DTYPES = frozenset(("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"))
_MOST_RANKS = 1 << 16
_LARGEST_SIZE = 1 << 20  # heads of a state, or channels of a head


@dataclass(frozen=True)
class Port:
    """One graph input or output. `dims`: a number, or the name of a dynamic dimension."""

    name: str
    dtype: str
    dims: list[int | str]


@dataclass(frozen=True)
class StateTensor:
    """One state: the graph reads it from input `past` and writes it to output `present`, same shape.

    `role`: recurrent_state, key or value. `dims` of a recurrent state are ["batch", H, K, V], of a key or value
    ["batch", G, "capacity", K].
    """

    layer: int
    kind: Kind
    role: Literal["recurrent_state", "key", "value"]
    past: str
    present: str
    dtype: str
    dims: list[int | str]


@dataclass(frozen=True)
class Mapping:
    """How the model is cut over ranks (names as TensorRT-LLM users know them): rank = cp_rank * tp_size + tp_rank."""

    tp_size: int = 1
    moe_tp_size: int = 1
    moe_ep_size: int = 1
    cp_size: int = 1  # sets of ranks that share the tokens of a prefill chunk; each holds the whole model

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tp_size * self.cp_size


@dataclass(frozen=True)
class Limits:
    """`max_seq_len` counts prompt and generated tokens of one row; `prefill_chunk` is the default chunk."""

    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int


@dataclass(frozen=True)
class RankFiles:
    """Files of one rank, names inside the engine directory.

    `graph` runs any number of tokens; `prefill_graph`, if there, runs several tokens faster. `weights` lists where
    each weight's bytes lie.
    """

    rank: int
    graph: str
    weights: str | None = None
    prefill_graph: str | None = None


@dataclass(frozen=True)
class VisionHalf:
    """The graph that turns tiles of an image into rows like token embeddings, and how images become tiles.

    `graph`, `weights`: as of `RankFiles`. `tile`: pixels along a side of a tile, which has `patches_per_side` patches along it.
    `pinpoints`: resolutions [height, width] that images are brought to. `mean`, `std`: of red, green, blue, for values of 0 to 1.
    """

    graph: str
    weights: str
    image_token_id: int
    tile: int
    patches_per_side: int
    pinpoints: list[list[int]]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Checkpoint:
    """What the engine was built from. `path` is where it lay then; `fingerprint` identifies its content."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class FileRecord:
    """`sha256` of the whole file; `sampled` of its size and evenly spaced blocks (see `engines.digest`)."""

    size: int
    sha256: str
    sampled: str


@dataclass(frozen=True)
class EngineConfig:
    """The whole of `config.json`."""

    mxcompile_version: str
    target: str
    model: dict[str, Any]
    dtype: str
    limits: Limits
    inputs: list[Port]
    outputs: list[Port]
    states: list[StateTensor]
    ranks: list[RankFiles]
    schema_version: int = SCHEMA_VERSION
    quantization: dict[str, Any] | None = None
    mapping: Mapping = field(default_factory=Mapping)
    taps: list[str] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    # Engines without one do not mention it.
    vision: VisionHalf | None = field(default=None, metadata={"optional": True})

    @property
    def num_layers(self) -> int:
        return 1 + max((s.layer for s in self.states), default=-1)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        for port in self.outputs:
            if port.name == "logits" and isinstance(port.dims[-1], int):
                return port.dims[-1]
        raise EngineError("the engine's configuration has no logits output; rebuild the engine")

    def layers(self, kind: Kind) -> list[int]:
        """Layers of one kind, ascending."""
        return sorted({s.layer for s in self.states if s.kind == kind})

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        if self.vision is None:
            del values["vision"]
        return json.dumps(values, indent=1, sort_keys=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> EngineConfig:
        """Parse; `source` (a file name) goes into errors."""
        try:
            raw = json.loads(text)
        except RecursionError:
            raise EngineError(f"{source}: not valid JSON (nested too deeply); rebuild the engine") from None
        except ValueError as error:
            raise EngineError(f"{source}: not valid JSON ({error}); rebuild the engine") from None
        if not isinstance(raw, dict) or "schema_version" not in raw:
            raise EngineError(f"{source}: no schema_version; this is not an engine directory of mxcompile")
        if raw["schema_version"] != SCHEMA_VERSION:
            raise EngineError(
                f"{source}: schema version {raw['schema_version']!r}, this mxcompile reads {SCHEMA_VERSION}; "
                "rebuild the engine or use the mxcompile version that built it"
            )
        config: EngineConfig = _read(cls, raw, source, "")
        _check(config, source)
        return config


def _check(config: EngineConfig, source: str) -> None:
    """What types alone do not say. Raises EngineError that names the key."""
    for key in ("inputs", "outputs", "states"):
        for index, port in enumerate(getattr(config, key)):
            where = f"{source}: '{key}.{index}"
            if port.dtype not in _DTYPES:
                raise EngineError(f"{where}.dtype' has an unexpected value {port.dtype!r}; rebuild the engine")
            if len(port.dims) != (4 if key == "states" else max(1, len(port.dims))):
                raise EngineError(f"{where}.dims' has {len(port.dims)} dimensions; rebuild the engine")
    _check_states(config, source)
    for name, size in dataclasses.asdict(config.mapping).items():
        if not 1 <= size <= _MOST_RANKS:
            raise EngineError(f"{source}: 'mapping.{name}' has an unexpected value {size!r}; rebuild the engine")


def _check_states(config: EngineConfig, source: str) -> None:
    """Each state is an input and an output of the graph, of its type and sizes, and has the dimensions of its role."""
    inputs, outputs = ({port.name: port for port in ports} for ports in (config.inputs, config.outputs))
    for index, spec in enumerate(config.states):
        for key, name, ports in (("past", spec.past, inputs), ("present", spec.present, outputs)):
            port = ports.get(name)
            if port is None or port.dtype != spec.dtype or not _same_sizes(spec, port):
                raise EngineError(
                    f"{source}: 'states.{index}' is not what the graph's {key} {name!r} is; rebuild the engine"
                )
        form = [dim if isinstance(dim, str) else "size" for dim in spec.dims]
        wanted = ["batch", "size", "size" if spec.role == "recurrent_state" else "capacity", "size"]
        sizes = [dim for dim in spec.dims if isinstance(dim, int)]
        if form != wanted or not all(0 < size <= _LARGEST_SIZE for size in sizes):
            raise EngineError(
                f"{source}: 'states.{index}.dims' has an unexpected value {spec.dims}; rebuild the engine"
            )


def _same_sizes(spec: StateTensor, port: Port) -> bool:
    """Whether the graph has the state's sizes; where the state has a name, it may have a number (a fixed capacity)."""
    pairs = zip(spec.dims, port.dims, strict=False)
    return len(spec.dims) == len(port.dims) and all(isinstance(mine, str) or mine == theirs for mine, theirs in pairs)


def _read(kind: Any, raw: Any, source: str, where: str) -> Any:
    """Turn plain JSON into `kind` (a dataclass, builtin, list, dict, Literal or union), strictly."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(raw, dict):
        hints = typing.get_type_hints(kind)
        for key in raw:
            if key not in hints:
                raise EngineError(f"{source}: unknown key {where + key!r}; rebuild the engine")
        values = {}
        for spec in dataclasses.fields(kind):
            if spec.name in raw:
                values[spec.name] = _read(hints[spec.name], raw[spec.name], source, f"{where}{spec.name}.")
            elif not spec.metadata.get("optional"):
                raise EngineError(f"{source}: missing key {where + spec.name!r}; rebuild the engine")
        return typing.cast(Any, kind)(**values)
    if origin is list and isinstance(raw, list):
        return [_read(args[0], item, source, f"{where}{i}.") for i, item in enumerate(raw)]
    if origin is dict and isinstance(raw, dict):
        return {key: _read(args[1], item, source, f"{where}{key}.") for key, item in raw.items()}
    if origin is Literal and raw in args:
        return raw
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if option is type(None) and raw is None:
                return None
            if isinstance(option, type) and type(raw) is option:
                return raw
        for option in args:
            if (dataclasses.is_dataclass(option) or typing.get_origin(option)) and isinstance(raw, (dict, list)):
                return _read(option, raw, source, where)
    if kind is Any or (isinstance(kind, type) and type(raw) is kind):
        return raw
    raise EngineError(f"{source}: {where.rstrip('.')!r} has an unexpected value {str(raw)[:60]!r}; rebuild the engine")
