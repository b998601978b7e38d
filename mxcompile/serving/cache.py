"""States that outlive their request: prefixes of prompts by content, sessions by name, one memory budget for both.

A prefix is kept in blocks of one prefill chunk. A block's key is the hash of the block before and its own tokens, so
equal keys mean equal whole prefixes. Each block holds the recurrent states at its end and only its own part of the
keys and values; a hit joins the parts. Entries leave in the order of their last use, later blocks of a prefix before
earlier ones; a session that must leave goes to disk when a folder was given.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.interface import RowSnapshot, State
from mxcompile.errors import MxcompileError
from mxcompile.serving.state_file import StateFileError, read_state, write_state


@dataclass(frozen=True)
class Saved:
    """A session between two requests. `unfed` tokens were drawn but not fed: they precede what comes next."""

    snapshot: RowSnapshot
    unfed: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.snapshot.length


class MemoryBudget:
    """Bytes that caches may hold together; evicts what was not used for longest."""

    def __init__(self, limit: int) -> None:
        """`limit` in bytes."""
        self.limit = limit
        self.used = 0
        self.lock = threading.RLock()
        self._entries: OrderedDict[Hashable, tuple[RowSnapshot | Saved, int]] = OrderedDict()
        self.stores: dict[str, SessionStore] = {}

    def get(self, key: Hashable) -> RowSnapshot | Saved | None:
        with self.lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: RowSnapshot | Saved) -> bool:
        """Keep `value`, evicting others; False when it is larger than the whole budget."""
        size = (value.snapshot if isinstance(value, Saved) else value).nbytes
        with self.lock:
            self.drop(key)
            if size > self.limit:
                return False
            while self.used + size > self.limit:
                oldest, (lost, _) = next(iter(self._entries.items()))
                self.drop(oldest)
                if isinstance(lost, Saved):
                    assert isinstance(oldest, tuple)
                    self.stores["session"].spill(oldest[1], lost)
            self._entries[key] = (value, size)
            self.used += size
            return True

    def drop(self, key: Hashable) -> None:
        with self.lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.used -= entry[1]

    def items(self) -> list[tuple[Hashable, RowSnapshot | Saved]]:
        with self.lock:
            return [(key, value) for key, (value, _) in self._entries.items()]


class StateCache:
    """Prefixes of prompts. Used by the scheduler's thread only."""

    def __init__(self, budget: MemoryBudget, block: int, engine_digest: str) -> None:
        """`block`: tokens of one block. `engine_digest` keeps engines apart that share a budget."""
        self.block = block
        self._budget, self._seed = budget, engine_digest.encode()

    def find(self, prompt: Sequence[int]) -> RowSnapshot | None:
        """The longest known prefix that leaves at least one token of `prompt` to read."""
        parts: list[RowSnapshot] = []
        keys: list[bytes] = []
        for key in self._keys(prompt[:-1]):
            found = self._budget.get(key)
            if not isinstance(found, RowSnapshot):
                break
            parts.append(found)
            keys.append(key)
        for key in reversed(keys):  # the first block was used last: it leaves after those that need it
            self._budget.get(key)
        if not parts:
            return None

        def join(which: str) -> dict[int, np.ndarray]:
            layers = getattr(parts[0], which)
            return {layer: np.concatenate([getattr(part, which)[layer] for part in parts], axis=1) for layer in layers}

        return RowSnapshot(len(parts) * self.block, parts[-1].recurrent, join("key"), join("value"))

    def store(self, prefix: Sequence[int], state: State, row: int) -> None:
        """Keep the last block of `prefix` (whole blocks), which `row` has just read; its earlier blocks must be known
        for it to be of use.
        """
        keys = self._keys(prefix)
        if any(self._budget.get(key) is None for key in keys[:-1]) or self._budget.get(keys[-1]) is not None:
            return
        whole = state.read_row(row)
        own = slice(whole.length - self.block, whole.length)

        def cut(arrays: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
            return {layer: array[:, own].copy() for layer, array in arrays.items()}

        self._budget.put(keys[-1], RowSnapshot(self.block, whole.recurrent, cut(whole.key), cut(whole.value)))
        for key in reversed(keys):
            self._budget.get(key)

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        """Keys of the whole blocks of `tokens`."""
        keys, key = [], self._seed
        for end in range(self.block, len(tokens) + 1, self.block):
            part = np.asarray(tokens[end - self.block : end], "<i8").tobytes()
            key = hashlib.sha256(key + part).digest()
            keys.append(key)
        return keys


class SessionStore:
    """Sessions by name, in the budget's memory or, when they had to leave it, in files."""

    def __init__(self, budget: MemoryBudget, engine_digest: str, folder: Path | None = None) -> None:
        """`folder`: where sessions go that leave memory; None forgets them. A file of another engine is refused."""
        self._budget, self._digest, self._folder = budget, engine_digest, folder
        budget.stores["session"] = self
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise MxcompileError(f"{folder}: cannot be used for states: {error.strerror}") from error

    def load(self, name: str) -> Saved | None:
        """A session, read back from its file if it left memory; None when it is not known."""
        found = self._budget.get(("session", name))
        if isinstance(found, Saved):
            return found
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        try:
            snapshot, unfed = read_state(file, self._digest, name)
        except StateFileError:
            return None
        saved = Saved(snapshot, tuple(unfed))
        self._budget.put(("session", name), saved)
        return saved

    def save(self, name: str, snapshot: RowSnapshot, unfed: Sequence[int]) -> None:
        """Keep a session; one that is larger than the whole budget goes straight to its file."""
        saved = Saved(snapshot, tuple(unfed))
        file = self._file(name)
        if file is not None:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)  # it holds an earlier turn
        if not self._budget.put(("session", name), saved):
            self.spill(name, saved)

    def spill(self, name: str, saved: Saved) -> None:
        """Write a session that leaves memory to its file, if there is a folder; a full disk forgets the session."""
        file = self._file(name)
        if file is not None:
            with contextlib.suppress(OSError):
                write_state(file, self._digest, name, saved.snapshot, saved.unfed)

    def flush(self) -> int:
        """Write all sessions to files, for the next start; returns how many."""
        sessions = [(key, value) for key, value in self._budget.items() if isinstance(value, Saved)]
        for key, saved in sessions:
            assert isinstance(key, tuple)
            self.spill(key[1], saved)
        return len(sessions) if self._folder is not None else 0

    def _file(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.state"
