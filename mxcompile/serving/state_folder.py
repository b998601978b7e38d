"""The folder of session files: one server's at a time, within a limit of bytes, never the reason that serving stops."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engines.interface import RowSnapshot
from mxcompile.errors import MxcompileError
from mxcompile.serving.state_file import PARTIAL, StateFileError, encode_state, read_state, state_bytes, write_parts

logger = logging.getLogger("mxcompile.serving")
_LOCK = ".lock"


class StateFolder:
    """Sessions of one engine in files. What does not fit pushes out what was not used for longest."""

    def __init__(self, folder: Path, engine_digest: str, limit: int | None = None) -> None:
        """`limit` in bytes; None: what the disk holds. Raises MxcompileError when the folder cannot be used, or another
        server uses it.
        """
        self._folder, self._digest, self._limit = folder, engine_digest, limit
        self.counts: Counter[str] = Counter({"written": 0, "failed": 0, "pushed_out": 0, "refused": 0})
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MxcompileError(f"{folder}: cannot be used for states: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise MxcompileError(
                f"{folder}: another server keeps its states there; give each server its own"
            ) from error
        for file in folder.glob(f"{PARTIAL}*"):  # of a server that was killed while it wrote: nobody else may write
            with contextlib.suppress(OSError):
                file.unlink()
        self._make_room(0, None)

    @property
    def nbytes(self) -> int:
        """Bytes of all session files."""
        return sum(size for _, size, _ in self._files())

    def read(self, name: str) -> tuple[RowSnapshot, list[int]] | None:
        """A session's state and unfed tokens; None when there is no file, or one that is damaged or of another engine."""
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            found = read_state(file, self._digest, name)
        except StateFileError as error:
            self._say("state_refused", name, str(error))
            self.counts["refused"] += 1
            return None
        self._used(file)
        return found

    def write(self, name: str, snapshot: RowSnapshot, unfed: Sequence[int]) -> bool:
        """Write a session's file, or say in the log why not."""
        file = self._file(name)
        parts = encode_state(self._digest, name, snapshot, unfed)
        size = state_bytes(parts)
        if self._limit is not None and size > self._limit:
            self.counts["failed"] += 1
            self._say("state_not_written", name, f"it has {size} bytes, over the limit of {self._limit}")
            return False
        self._make_room(size, file)
        try:
            write_parts(file, parts)
        except OSError as error:
            self.counts["failed"] += 1
            self._say("state_not_written", name, error.strerror or str(error))
            return False
        self._used(file)
        self.counts["written"] += 1
        return True

    def forget(self, name: str) -> None:
        """Remove a session's file, if there is one."""
        with contextlib.suppress(OSError):
            self._file(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._lock)

    def _used(self, file: Path) -> None:
        """Note that a file was used now, by a finer clock than the file system's own."""
        now = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(file, ns=(now, now))

    def _make_room(self, size: int, replaced: Path | None) -> None:
        """Remove files, the one that was not used for longest first, until `size` more bytes fit."""
        if self._limit is None:
            return
        files = sorted(entry for entry in self._files() if entry[2] != replaced)
        total = sum(bytes_ for _, bytes_, _ in files)
        for _, bytes_, file in files:
            if total + size <= self._limit:
                break
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                self._say("state_not_removed", file.name, error.strerror or str(error))
                continue
            total -= bytes_
            self.counts["pushed_out"] += 1

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each session file was used last (ns), its size in bytes, its path."""
        found = []
        for file in self._folder.glob("*.state"):
            with contextlib.suppress(OSError):  # gone meanwhile
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        return found

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.state"

    def _say(self, event: str, name: str, why: str) -> None:
        logger.error(json.dumps({"event": event, "session": name, "message": why}))
