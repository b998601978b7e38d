"""How a weight is put together from pieces of files: what a list of weights says of it, and the bytes that come of it.

A weight's bytes are those of its pieces, one behind the other. A piece takes `width` bytes of each of its strands in turn, `times` times;
a strand begins at byte `offset` of a file and goes on by `stride`. That says all that a weight is in terms of a checkpoint:

    a stored tensor, or whole rows of it    one strand, once
    columns of it                           one strand, as often as it has rows, the stride being a whole row
    experts in a stack                      a piece per expert
    experts with gate and up rows in turn   a piece of two strands per expert
    rows of zeros behind                    a piece without a strand

Lists come from untrusted files: nothing is read before `check_pieces` has seen it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STAGING_BYTES = 64 << 20  # of the buffer that strands are put together in, whatever the weight's size


@dataclass(frozen=True)
class Strand:
    """`file`: index into the list's files. `offset` and `stride` in bytes."""

    file: int
    offset: int
    stride: int


@dataclass(frozen=True)
class Piece:
    """`times` times `width` bytes of each strand; of zeros where there is none."""

    strands: tuple[Strand, ...]
    width: int
    times: int = 1

    @classmethod
    def run(cls, file: int, offset: int, nbytes: int) -> Piece:
        """Bytes as they lie."""
        return cls((Strand(file, offset, nbytes),), nbytes)

    @property
    def nbytes(self) -> int:
        return self.width * self.times * max(1, len(self.strands))

    @property
    def is_run(self) -> bool:
        """Whether the bytes lie in a file as the weight wants them."""
        return len(self.strands) == 1 and (self.times == 1 or self.strands[0].stride == self.width)

    def to_plain(self) -> list[Any]:
        """For JSON: [[[file, offset, stride], ...], width, times]."""
        return [[[s.file, s.offset, s.stride] for s in self.strands], self.width, self.times]

    @classmethod
    def from_plain(cls, plain: Any) -> Piece:
        """Raises ValueError or TypeError for what `to_plain` never gives."""
        strands, width, times = plain
        return cls(tuple(Strand(*strand) for strand in strands), width, times)


def check_pieces(pieces: Sequence[Piece], nbytes: int, sizes: Sequence[int]) -> None:
    """ValueError unless the pieces make `nbytes` bytes, each of which lies in one of the files of these sizes."""
    for piece in pieces:
        numbers = [piece.width, piece.times, *(n for s in piece.strands for n in (s.file, s.offset, s.stride))]
        if not all(type(number) is int and abs(number) < 2**63 for number in numbers):
            raise ValueError("a piece has something else than numbers of bytes")
        if piece.width < 0 or piece.times < 0:
            raise ValueError(f"a piece takes {piece.width} bytes {piece.times} times")
        for strand in piece.strands:
            if not 0 <= strand.file < len(sizes):
                raise ValueError(f"bytes of file {strand.file}, of {len(sizes)} files")
            if piece.times > 1 and strand.stride < piece.width:
                raise ValueError(f"a piece takes {piece.width} bytes each {strand.stride}, some of them twice")
            end = strand.offset + max(0, piece.times - 1) * strand.stride + piece.width
            if not 0 <= strand.offset <= end <= sizes[strand.file]:
                raise ValueError("a piece lies outside its file")
    found = sum(piece.nbytes for piece in pieces)
    if found != nbytes:
        raise ValueError(f"the pieces are {found} bytes together, the shape needs {nbytes}")


def blocks(pieces: Sequence[Piece], files: Sequence[np.ndarray], staging: np.ndarray) -> Iterator[np.ndarray]:
    """The weight's bytes in order, in arrays of at most `len(staging)` bytes.

    Args:
        pieces: checked ones (`check_pieces`).
        files: the bytes of the files, usually mapped. Runs of them come as they are, as views.
        staging: uint8; what has to be put together is put here, so an array is good until the next one is asked for.
    """
    for piece in pieces:
        if piece.is_run:
            strand = piece.strands[0]
            yield from _cut(files[strand.file], strand.offset, piece.nbytes, len(staging))
        elif not piece.strands:
            staging[: min(len(staging), piece.nbytes)] = 0
            yield from _cut(staging, 0, piece.nbytes, len(staging), again=True)
        elif piece.width * len(piece.strands) > len(staging):
            for index in range(piece.times):
                for strand in piece.strands:
                    start = strand.offset + index * strand.stride
                    yield from _cut(files[strand.file], start, piece.width, len(staging))
        else:
            yield from _woven(piece, files, staging)


def _cut(source: np.ndarray, start: int, nbytes: int, most: int, again: bool = False) -> Iterator[np.ndarray]:
    """`nbytes` of `source` from `start` on; with `again` always the same ones."""
    for done in range(0, nbytes, most):
        first = start if again else start + done
        yield np.asarray(source[first : first + min(most, nbytes - done)])


def _woven(piece: Piece, files: Sequence[np.ndarray], staging: np.ndarray) -> Iterator[np.ndarray]:
    round_bytes = piece.width * len(piece.strands)
    if not round_bytes:
        return
    most = len(staging) // round_bytes
    for first in range(0, piece.times, most):
        rounds = min(most, piece.times - first)
        out = staging[: rounds * round_bytes].reshape(rounds, len(piece.strands), piece.width)
        for index, strand in enumerate(piece.strands):
            start = strand.offset + first * strand.stride
            # The last round may end where the file does, so what is viewed ends with it.
            whole = np.asarray(files[strand.file][start : start + (rounds - 1) * strand.stride + piece.width])
            out[:, index] = np.lib.stride_tricks.as_strided(whole, (rounds, piece.width), (strand.stride, 1))
        yield out.reshape(-1)
