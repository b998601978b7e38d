"""Opens a checkpoint folder: configuration, and where every tensor lies. Reads headers only, never a whole shard, and
needs no torch.

Accepted are the two forms that Hugging Face writes: one `model.safetensors`, or shards with
`model.safetensors.index.json`. Pickle files are refused: loading one runs the code inside it. Everything in the folder
is untrusted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import resource
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_defs.checkpoint.names import original_slices
from model_defs.checkpoint.safetensors_header import Header, TensorEntry, file_size, read_header
from model_defs.config import ModelConfig
from model_defs.config_schemas import read_config
from model_defs.errors import CheckpointError
from model_defs.strict_json import parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_INDEX_BYTES = 100_000_000
_FINGERPRINT_WHOLE = 64 << 20  # files up to this size are hashed whole
_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK = 64, 16 << 10  # larger ones in evenly spaced blocks: 1 MiB each


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    # "missing shard", "damaged shard", "truncated shard", "index", "missing", "unexpected", "shape", "dtype", "not
    # finite"
    kind: str
    subject: str  # name of the file or tensor
    message: str  # a full sentence without the folder

    def __str__(self) -> str:
        return self.message


@dataclass
class Checkpoint:
    """An opened checkpoint. Use `Checkpoint.open`."""

    folder: Path  # absolute
    config: ModelConfig
    entries: dict[str, TensorEntry]  # by original tensor name
    tokenizer_files: tuple[Path, ...]
    problems: list[Problem]  # found in files; empty after a strict open
    _headers: list[Header] = field(repr=False)
    _maps: dict[Path, NDArray[np.uint8]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _fingerprint: str | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, strict: bool = True) -> Checkpoint:
        """Reads `folder`'s configuration and the headers of its shards.

        A missing or damaged shard raises CheckpointError; with `strict=False` it is recorded in `problems` instead, and
        `entries` holds what can be read (`verify` reports both). Raises ConfigError for a configuration of another
        architecture.
        """
        path = Path(folder)
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise CheckpointError(
                f"checkpoint {path}: {what}; give the folder that holds {CONFIG_FILE} and the safetensors files"
            )
        path = path.resolve()
        try:
            empty = not any(path.iterdir())
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: cannot be read ({os.strerror(error.errno or 0)})") from None
        if empty:
            raise CheckpointError(f"checkpoint {path}: the folder is empty")
        if not (path / CONFIG_FILE).exists():
            raise CheckpointError(f"checkpoint {path}: {CONFIG_FILE} is missing")
        config = _with_generation_ids(read_config(path / CONFIG_FILE), path / GENERATION_CONFIG_FILE)
        claims = _shards(path)
        problems: list[Problem] = []
        headers = _headers(path, claims, problems)
        entries = _collect(headers, claims, config.tensor_prefix, problems)
        if strict and problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise CheckpointError(f"checkpoint {path}: {problems[0]}{more}")
        tokenizer = tuple(path / name for name in TOKENIZER_FILES if (path / name).is_file())
        return cls(path, config, entries, tokenizer, problems, headers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk, unused ones included."""
        return sum(header.declared_bytes - len(header.raw) for header in self._headers)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, absolute, in the order of their names."""
        return tuple(header.file for header in self._headers)

    def array(self, name: str) -> NDArray:
        """The tensor as a read-only view of the mapped file; nothing is read until its elements are. The type is the
        stored one (bfloat16 and float8 from ml_dtypes). Raises CheckpointError for an unknown name or a file changed
        since `open`.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"checkpoint {self.folder}: tensor {name} is missing")
        whole = self._map(entry.file)
        try:
            return whole[entry.offset : entry.offset + entry.nbytes].view(entry.numpy_dtype).reshape(entry.shape)
        except ValueError:
            raise CheckpointError(f"{entry.file}: tensor {name} has a shape that no array can have") from None

    def _map(self, path: Path) -> NDArray[np.uint8]:
        with self._lock:
            if path not in self._maps:
                # A file that shrank behind a mapping kills the process at the first read, so its size is checked here.
                expected = next(header.file_bytes for header in self._headers if header.file == path)
                if file_size(path) != expected:
                    raise CheckpointError(f"{path}: changed while in use; start again")
                try:
                    _keep_open_files_free()
                    with path.open("rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be mapped ({os.strerror(error.errno or 0)})") from None
                self._maps[path] = np.frombuffer(mapped, np.uint8)
            return self._maps[path]

    def fingerprint(self) -> str:
        """SHA-256 (hex) that tells checkpoints apart: the configuration, and per file its name, size, header and
        contents.

        Contents are hashed whole up to 64 MiB and in 64 evenly spaced blocks beyond, so that 900 GB take seconds. A
        change of single weights in a large shard can pass unseen: this identifies a checkpoint, it does not protect it.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
            for header in self._headers:
                digest.update(f"\n{header.file.name}\n{header.file_bytes}\n".encode())
                digest.update(header.raw)
                try:
                    with header.file.open("rb") as file:
                        for start, length in _sampled_blocks(header.file_bytes):
                            file.seek(start)
                            digest.update(file.read(length))
                except OSError as error:
                    raise CheckpointError(f"{header.file}: cannot be read ({os.strerror(error.errno or 0)})") from None
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _keep_open_files_free() -> None:
    """Let this process open one file more, as far as the system lets it: Python keeps a mapped file open, and of hundreds of shards
    little of a usual limit of 1024 would be left for a server's connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft + 1, hard))


def _sampled_blocks(size: int) -> Iterable[tuple[int, int]]:
    if size <= _FINGERPRINT_WHOLE:
        return [(start, 1 << 20) for start in range(0, size, 1 << 20)]
    last = size - _FINGERPRINT_BLOCK
    return [(last * i // (_FINGERPRINT_BLOCKS - 1), _FINGERPRINT_BLOCK) for i in range(_FINGERPRINT_BLOCKS)]


def _shards(folder: Path) -> dict[str, list[str]]:
    """File name -> tensors that the index claims are in it; no claims for a single file."""
    if (folder / SINGLE_FILE).exists():
        return {SINGLE_FILE: []}
    if (folder / INDEX_FILE).exists():
        return _read_index(folder / INDEX_FILE)
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"checkpoint {folder}: {INDEX_FILE} is missing, which says what its safetensors files hold"
        )
    if any(name.endswith(_PICKLES) for name in names):
        raise CheckpointError(
            f"checkpoint {folder}: holds pickle files only, which can run code when loaded; convert it to safetensors"
        )
    raise CheckpointError(f"checkpoint {folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _read_index(path: Path) -> dict[str, list[str]]:
    if file_size(path) > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: is too large for an index")
    try:
        weight_map = parse_object(path.read_bytes()).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be understood: {error}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    claims: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not _is_plain_file_name(name):
            raise CheckpointError(
                f"{path}: {tensor!r} is said to be in {name!r}, which is not the name of a safetensors file here"
            )
        claims.setdefault(name, []).append(tensor)
    return dict(sorted(claims.items()))


def _is_plain_file_name(name: object) -> bool:
    """No path, so that an index cannot point outside its folder."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not set(name) & {"/", "\\", "\0", ":"}
        and name[0] != "."
    )


def _headers(folder: Path, claims: dict[str, list[str]], problems: list[Problem]) -> list[Header]:
    headers = []
    for name in claims:
        path = folder / name
        if not path.exists():
            problems.append(
                Problem(
                    "missing shard", name, f"shard {name} is missing ({len(claims[name])} tensors); download it again"
                )
            )
            continue
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(Problem("damaged shard", name, str(error).replace(str(folder) + os.sep, "shard ", 1)))
            continue
        if header.file_bytes < header.declared_bytes:
            size = f"{header.file_bytes} of {header.declared_bytes} bytes"
            problems.append(Problem("truncated shard", name, f"shard {name} is truncated ({size}); download it again"))
        headers.append(header)
    return headers


def _collect(
    headers: list[Header], claims: dict[str, list[str]], tensor_prefix: str, problems: list[Problem]
) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for header in headers:
        shard = header.file.name
        for claimed in claims[shard]:
            if claimed not in header.entries:
                problems.append(
                    Problem("index", claimed, f"tensor {claimed} is not in {shard}, where the index says it is")
                )
        for stored in header.entries.values():
            if stored.offset + stored.nbytes > header.file_bytes:
                continue  # cut off: the shard is already reported, and nothing may map bytes that are not there
            for entry in _in_original_layout(stored, tensor_prefix):
                if entry.name in entries:
                    places = f"{entries[entry.name].file.name} and {shard}"
                    problems.append(Problem("index", entry.name, f"tensor {entry.name} is stored twice, in {places}"))
                else:
                    entries[entry.name] = entry
    return entries


def _in_original_layout(stored: TensorEntry, tensor_prefix: str) -> list[TensorEntry]:
    slices = original_slices(stored.name, stored.shape, tensor_prefix)
    if slices is None:
        return [stored]
    item = stored.numpy_dtype.itemsize
    return [
        dataclasses.replace(
            stored,
            name=part.name,
            offset=stored.offset + part.start * item,
            nbytes=int(np.prod(part.shape, dtype=np.int64)) * item,
            shape=part.shape,
        )
        for part in slices
    ]


def _with_generation_ids(config: ModelConfig, path: Path) -> ModelConfig:
    """Token ids that config.json leaves null, from generation_config.json; a malformed one is ignored, as it is
    optional.
    """
    if not path.is_file() or (config.bos_token_id is not None and config.eos_token_id is not None):
        return config
    try:
        values = parse_object(path.read_bytes()[:_MAX_INDEX_BYTES])
    except (ValueError, OSError):
        return config
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id"):
        value = values.get(key)
        if getattr(config, key) is None and isinstance(value, int) and 0 <= value < config.vocab_size:
            found[key] = value
    return dataclasses.replace(config, **found)
