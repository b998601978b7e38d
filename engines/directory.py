"""Reading and writing engine directories.

A directory is complete or absent: the writer fills a hidden sibling and renames it when whole. The reader trusts
nothing: every file listed in `config.json` must be there with its size and digest, and no other file may be.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO

from engines import digest
from engines.config import EngineConfig, FileRecord
from engines.errors import ENVIRONMENT, EngineError

CONFIG = "config.json"
# Anything may be put here after the build (reports of validation and benchmarks); never read by a session.
FREE_FOLDERS = ("report",)


def inside(name: str) -> PurePosixPath:
    """`name` as a path that stays inside its folder, or EngineError (names come from untrusted files)."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name:
        raise EngineError(f"{name!r} is not a name inside the engine directory; the engine was tampered with")
    return path


@contextlib.contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Turn a failing disk into one EngineError (exit code 3) that says what was being done."""
    try:
        yield
    except OSError as caught:
        error = _first(caught)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "no space left on the disk; free some or choose another output folder"
        else:
            hint = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        raise EngineError(f"{doing}: {hint}{where}", exit_code=ENVIRONMENT) from caught


def _first(error: OSError) -> OSError:
    """The first of those that `shutil.copytree` collects as (source, target, text)."""
    if not isinstance(error, shutil.Error) or not isinstance(error.args[0], list):
        return error
    text = str(error.args[0][0][2])
    number = re.match(r"\[Errno (\d+)\]", text)
    return OSError(text) if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def read_config(path: str | os.PathLike[str]) -> EngineConfig:
    """`config.json` of the engine directory `path`, without looking at the other files."""
    folder = Path(path)
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such engine directory")
    file = folder / CONFIG
    if not file.is_file():
        raise EngineError(f"{folder}: no {CONFIG}; this is not an engine directory (or its build never finished)")
    with os_errors(f"reading {file}"):
        text = file.read_text(encoding="utf-8", errors="replace")
    return EngineConfig.from_json(text, str(file))


def verify_files(path: str | os.PathLike[str], config: EngineConfig, *, whole: bool = False) -> None:
    """Check that exactly the listed files are there, with their sizes and digests.

    Files above 64 MiB are checked by size and sampled digest, or wholly with `whole=True`. EngineError names the
    first file that is missing, extra or different.
    """
    folder = Path(path)
    listed = {str(inside(name)) for name in config.files}
    present = {
        str(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()
    }
    present = {name for name in present if name.split("/")[0] not in FREE_FOLDERS and name != CONFIG}
    for rank in config.ranks:
        for name in filter(None, (rank.graph, rank.weights, rank.prefill_graph)):
            if name not in listed:
                raise EngineError(f"{folder / CONFIG}: {name} of rank {rank.rank} is not among the listed files")
    for name in (config.vision.graph, config.vision.weights) if config.vision is not None else ():
        if name not in listed:
            raise EngineError(f"{folder / CONFIG}: {name} of the vision half is not among the listed files")
    for name in sorted(listed - present):
        raise EngineError(f"{folder / name}: missing from the engine directory; rebuild the engine")
    for name in sorted(present - listed):
        raise EngineError(f"{folder / name}: not part of the engine; remove it or rebuild the engine")
    for name, record in config.files.items():
        check_file(folder / name, record, whole=whole)


def check_file(file: Path, record: FileRecord, *, whole: bool = False) -> None:
    """Size and digest of one file against its record."""
    with os_errors(f"checking {file}"):
        size = file.stat().st_size
        if size != record.size:
            raise EngineError(f"{file}: {size} bytes, the engine expects {record.size}; rebuild the engine")
        if (whole or size <= digest.WHOLE_LIMIT) and record.sha256:
            found, expected = digest.sha256(file), record.sha256
        else:
            found, expected = digest.sampled(file), record.sampled
    if found != expected:
        raise EngineError(f"{file}: content differs from what was built (digest mismatch); rebuild the engine")


class HashingFile:
    """A binary file that knows the digest and the size of what went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += memoryview(data).nbytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class EngineFiles:
    """Writes files of an engine into the folder `path`, and keeps their digests in `records`. `target` is the name in errors.

    A process that builds one rank of an engine has this much of the writer; the one that called it adds the `records` to its own.
    """

    def __init__(self, path: Path | None, target: Path) -> None:
        self.path, self.target = path, target
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[HashingFile]:
        """A new file of the engine, to be written in order."""
        path = self._place(name)
        with os_errors(f"writing {self.target / name}"):
            with path.open("xb") as raw:
                file = HashingFile(raw)
                yield file
                raw.flush()
                os.fsync(raw.fileno())
            self.records[name] = FileRecord(file.size, file.sha256, digest.sampled(path))

    def write(self, name: str, data: bytes | str) -> None:
        """A new file with this content (text as UTF-8)."""
        with self.open(name) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    def add(self, name: str, source: str | os.PathLike[str]) -> None:
        """Copy a file from elsewhere into the engine."""
        with self.open(name) as file, Path(source).open("rb") as original:
            while block := original.read(1 << 20):
                file.write(block)

    def keep(self, name: str, source: Path, record: FileRecord) -> None:
        """A file of another engine as it is: the same file where the disk allows it, else a copy."""
        path = self._place(name)
        try:
            os.link(source, path)
        except OSError:
            self.add(name, source)
            record = self.records[name]
        self.records[name] = record

    def register(self, name: str) -> Path:
        """Path for a file that another tool writes; it is digested at commit."""
        path = self._place(name)
        self.records[name] = FileRecord(-1, "", "")
        return path

    def record(self, name: str) -> FileRecord:
        """Size and digests of a file written before."""
        return self.records[name]

    def _place(self, name: str) -> Path:
        if self.path is None:
            raise RuntimeError("EngineDirWriter is used outside its with block")
        path = self.path / inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class EngineDirWriter(EngineFiles):
    """Writes an engine directory whole or not at all.

        with EngineDirWriter("engine", force=False) as writer:
            with writer.open("rank0.onnx") as file: file.write(...)
            writer.add("tokenizer.json", checkpoint / "tokenizer.json")
            writer.commit(config)

    Leaving the block without `commit` (an error, Ctrl-C) removes everything written. What a killed process left is
    removed by the next writer of the same directory.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """`force` replaces an existing engine directory; anything else that is in the way is always refused."""
        super().__init__(None, Path(os.path.abspath(path)))
        self.force = force
        self._committed = False

    def __enter__(self) -> EngineDirWriter:
        self._refuse_existing()
        prefix = f".{self.target.name}.partial-"
        with os_errors(f"creating {self.target}"):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            for stale in self.target.parent.glob(f"{prefix}*"):
                if not _alive(stale.name[len(prefix) :].split("-")[0]):
                    shutil.rmtree(stale, ignore_errors=True)
            self.path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=self.target.parent))
            # mkdtemp makes it private; a finished engine has the usual mode.
            umask = os.umask(0)
            os.umask(umask)
            self.path.chmod(0o777 & ~umask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is not None and not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            with os_errors(f"writing {self.target}"):
                raise error

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        is_engine = self.target.is_dir() and (self.target / CONFIG).is_file()
        empty = self.target.is_dir() and not any(self.target.iterdir())
        if not (is_engine or empty):
            raise EngineError(f"{self.target}: exists and is not an engine directory; choose another output")
        if not (self.force or empty):
            raise EngineError(f"{self.target}: exists already; use --force to replace it")

    def commit(self, config: EngineConfig, check: Callable[[Path], None] | None = None) -> EngineConfig:
        """Write `config.json` with the digests of all files and put the directory in place.

        `check` is called with the finished directory before it takes its place: when it raises, whatever stood there stays.
        """
        assert self.path is not None
        with os_errors(f"writing {self.target}"):
            for name, record in self.records.items():
                if record.size < 0:
                    path = self.path / name
                    self.records[name] = FileRecord(path.stat().st_size, digest.sha256(path), digest.sampled(path))
            config = replace(config, files=dict(self.records))
            file = self.path / CONFIG
            with file.open("x", encoding="utf-8") as out:
                out.write(config.to_json())
                out.flush()
                os.fsync(out.fileno())
        if check is not None:
            check(self.path)
        with os_errors(f"writing {self.target}"):
            self._refuse_existing()
            old = None
            if os.path.lexists(self.target):
                old = self.target.with_name(f".{self.target.name}.partial-{os.getpid()}-old")
                os.rename(self.target, old)
            try:
                os.rename(self.path, self.target)
            except OSError:
                if old is not None:
                    os.rename(old, self.target)
                raise
            self._committed = True
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        return config


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
