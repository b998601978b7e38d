"""States that outlive their request: prefixes of prompts by content, sessions by name, one memory budget for both.

A prefix is kept in blocks of one prefill chunk. A block's key is the hash of the block before, its own tokens and the
digests of images among them, so equal keys mean equal whole prefixes. Two things are kept of a block, each by itself:
its part of the keys and values, which all longer prefixes need, and the recurrent states at its end, which only a
prompt that leaves there needs. For MiniMax-Text-01 the second is the larger one. So when room is short, the states
within a prompt leave first, and those stay where prompts ended, or parted from each other: those are where the next
prompt will leave.

What was not used for longest leaves first, later blocks of a prefix before earlier ones; a session that must leave
goes to disk when a folder was given.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.interface import RowSnapshot, State
from mxcompile.serving.images import PromptImage
from mxcompile.serving.state_folder import StateFolder


class Entry(Protocol):
    """What a budget holds."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Saved:
    """A session between two requests. `unfed` tokens were drawn but not fed: they precede what comes next."""

    snapshot: RowSnapshot
    unfed: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.snapshot.length

    @property
    def nbytes(self) -> int:
        return self.snapshot.nbytes


@dataclass(eq=False)
class _Part:
    """Keys and values of one block. `shared`: several prompts that were read had it."""

    key: dict[int, np.ndarray]
    value: dict[int, np.ndarray]
    shared: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in (self.key, self.value) for array in arrays.values())


@dataclass(eq=False)
class _End:
    """Recurrent states at the end of one block. `wanted`: a prompt has left here."""

    recurrent: dict[int, np.ndarray]
    wanted: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.recurrent.values())


def _own(arrays: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The same without views, which would keep more memory alive than they count for."""
    return {layer: array if array.base is None else array.copy() for layer, array in arrays.items()}


class MemoryBudget:
    """Bytes that caches may hold together; evicts what was not used for longest."""

    def __init__(self, limit: int) -> None:
        """`limit` in bytes."""
        self.limit = limit
        self.used = 0
        self.evicted = 0  # entries that had to leave for room, ever
        self.lock = threading.RLock()
        self.on_eviction: Callable[[Hashable, Entry], None] | None = None
        self._entries: OrderedDict[Hashable, tuple[Entry, int]] = OrderedDict()  # first to leave first

    def get(self, key: Hashable) -> Entry | None:
        """An entry, which counts as used now."""
        with self.lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def look(self, key: Hashable) -> Entry | None:
        """An entry, which keeps its place."""
        with self.lock:
            found = self._entries.get(key)
            return None if found is None else found[0]

    def put(self, key: Hashable, value: Entry) -> bool:
        """Keep `value`, evicting others; False when it is larger than the whole budget."""
        size = value.nbytes
        with self.lock:
            self.drop(key)
            if size > self.limit:
                return False
            while self.used + size > self.limit:
                oldest, (lost, _) = next(iter(self._entries.items()))
                self.drop(oldest)
                self.evicted += 1
                if self.on_eviction is not None:
                    self.on_eviction(oldest, lost)
            self._entries[key] = (value, size)
            self.used += size
            return True

    def expose(self, key: Hashable) -> None:
        """Let this entry leave first."""
        with self.lock:
            if key in self._entries:
                self._entries.move_to_end(key, last=False)

    def drop(self, key: Hashable) -> None:
        with self.lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.used -= entry[1]

    def items(self) -> list[tuple[Hashable, Entry]]:
        """All entries, the first to leave first."""
        with self.lock:
            return [(key, value) for key, (value, _) in self._entries.items()]


class StateCache:
    """Prefixes of prompts. Used by the scheduler's thread only."""

    def __init__(self, budget: MemoryBudget, block: int, engine_digest: str) -> None:
        """`block`: tokens of one block. `engine_digest` keeps engines apart that share a budget."""
        self.block = block
        self._budget, self._seed = budget, engine_digest.encode()

    def keys(self, tokens: Sequence[int], images: Sequence[PromptImage] = ()) -> list[bytes]:
        """Keys of the whole blocks of `tokens`, in which `images` take places: a block that has some of an image's places is
        another one for every other image, and for other places of the same.
        """
        keys, key = [], self._seed
        for end in range(self.block, len(tokens) + 1, self.block):
            start = end - self.block
            part = np.asarray(tokens[start:end], "<i8").tobytes()
            for image in images:
                if image.start < end and image.end > start:
                    part += np.array([image.start - start, image.tokens], "<i8").tobytes() + image.digest
            key = hashlib.sha256(key + part).digest()
            keys.append(key)
        return keys

    def find(self, keys: Sequence[bytes]) -> RowSnapshot | None:
        """What a row remembers after as many of these first blocks of a prompt as are known."""
        parts: list[_Part] = []
        end: _End | None = None
        blocks = 0
        for key in keys:
            part = self._budget.look(("part", key))
            if not isinstance(part, _Part):
                break
            parts.append(part)
            found = self._budget.look(("end", key))
            if isinstance(found, _End):
                end, blocks = found, len(parts)
        if end is None:
            return None
        end.wanted = True
        self._budget.get(("end", keys[blocks - 1]))
        self._touch(keys[:blocks])

        def join(which: str) -> dict[int, np.ndarray]:
            layers = getattr(parts[0], which)
            cut = [getattr(part, which) for part in parts[:blocks]]
            return {layer: np.concatenate([arrays[layer] for arrays in cut], axis=1) for layer in layers}

        return RowSnapshot(blocks * self.block, end.recurrent, join("key"), join("value"))

    def store(self, keys: Sequence[bytes], state: State, row: int) -> None:
        """Keep the last of these blocks of a prompt, which `row` has just read to its end; the blocks before must be
        known for it to be of use.
        """
        *before, last = keys
        if any(self._budget.look(("part", key)) is None for key in before):
            return
        part, end = self._budget.look(("part", last)), self._budget.look(("end", last))
        parted = part is None
        if isinstance(part, _Part):
            part.shared = True
        if part is None or end is None:
            read = state.read_row(row, len(before) * self.block)
            if part is None and not self._budget.put(("part", last), _Part(_own(read.key), _own(read.value))):
                return
            if end is None:
                self._budget.put(("end", last), _End(_own(read.recurrent)))
        else:
            self._budget.get(("end", last))
        if before:
            self._pass(before[-1], parted)
        self._touch(keys)
        if any(self._budget.look(("part", key)) is None for key in keys):  # it pushed out what it needs itself
            self._budget.drop(("part", last))
            self._budget.drop(("end", last))

    def _pass(self, key: bytes, parted: bool) -> None:
        """A prompt went on from this block's end, where it `parted` from others if they had the block too."""
        part, end = self._budget.look(("part", key)), self._budget.look(("end", key))
        fork = parted and isinstance(part, _Part) and part.shared
        if isinstance(end, _End) and not end.wanted and not fork:
            self._budget.expose(("end", key))

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The first block is used last: it leaves after those that need it."""
        for key in reversed(keys):
            self._budget.get(("part", key))


class SessionStore:
    """Sessions by name, in the budget's memory or, when they had to leave it, in files."""

    def __init__(
        self, budget: MemoryBudget, engine_digest: str, folder: Path | None = None, limit: int | None = None
    ) -> None:
        """`folder`: where sessions go that leave memory; None forgets them. `limit`: bytes that files may take there
        (default: any number). Raises MxcompileError when the folder cannot be used.
        """
        self._budget = budget
        self.files = StateFolder(folder, engine_digest, limit) if folder is not None else None
        budget.on_eviction = self._evicted

    def load(self, name: str) -> Saved | None:
        """A session, read back from its file if it left memory; None when it is not known."""
        found = self._budget.get(("session", name))
        if isinstance(found, Saved):
            return found
        read = self.files.read(name) if self.files is not None else None
        if read is None:
            return None
        saved = Saved(read[0], tuple(read[1]))
        self._budget.put(("session", name), saved)
        return saved

    def save(self, name: str, snapshot: RowSnapshot, unfed: Sequence[int]) -> None:
        """Keep a session; one that is larger than the whole budget goes straight to its file."""
        saved = Saved(snapshot, tuple(unfed))
        if self.files is not None:
            self.files.forget(name)  # it holds an earlier turn
        if not self._budget.put(("session", name), saved):
            self._spill(name, saved)

    def flush(self) -> int:
        """Write all sessions to files, for the next start; returns how many could be written."""
        sessions = [(key, value) for key, value in self._budget.items() if isinstance(value, Saved)]
        return sum(self._spill(key[1], saved) for key, saved in sessions if isinstance(key, tuple))

    def close(self) -> None:
        """Let another server use the folder."""
        if self.files is not None:
            self.files.close()

    def _evicted(self, key: Hashable, value: Entry) -> None:
        if isinstance(value, Saved) and isinstance(key, tuple):
            self._spill(key[1], value)

    def _spill(self, name: str, saved: Saved) -> bool:
        """Write a session that leaves memory to its file, if there is a folder and room; else it is forgotten."""
        return self.files is not None and self.files.write(name, saved.snapshot, saved.unfed)
