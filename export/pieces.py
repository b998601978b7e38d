"""What a weight is in terms of bytes of checkpoint files, for engines that put it together when they are loaded.

The form is that of `engines.pieces`, with files by name: a weight is its pieces one behind the other, and a piece takes `width` bytes of
each of its strands in turn, as many `times` as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from model_defs.weights import Recipe


class Entry(Protocol):
    """Where a checkpoint keeps one tensor."""

    @property
    def file(self) -> object: ...  # pathlib.Path, absolute

    @property
    def offset(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Strand(NamedTuple):
    """Bytes of `file` from `offset` on, the next ones each `stride` bytes further."""

    file: str
    offset: int
    stride: int


class Piece(NamedTuple):
    """`times` times `width` bytes of each strand in turn; of zeros where there is no strand."""

    strands: tuple[Strand, ...]
    width: int
    times: int

    @property
    def nbytes(self) -> int:
        return self.width * self.times * max(1, len(self.strands))

    @property
    def is_run(self) -> bool:
        """Whether the bytes lie in the file as the weight wants them."""
        return len(self.strands) == 1 and self.times == 1


Cut = tuple[slice, ...]  # of a stored tensor, one slice with start and stop per dimension


def pieces_of(recipe: Recipe, entries: Mapping[str, Entry], cut: Cut | None = None) -> tuple[Piece, ...]:
    """The pieces of the weight that `recipe` makes of these tensors, or of the same slice of each of them."""
    return tuple(_pieces(recipe.groups, entries, cut))


def run(file: str, offset: int, nbytes: int) -> Piece:
    """Bytes as they lie."""
    return Piece((Strand(file, offset, nbytes),), nbytes, 1)


def zeros(nbytes: int) -> Piece:
    """Bytes that no file has."""
    return Piece((), nbytes, 1)


def _pieces(groups: Sequence[tuple[str, ...]], entries: Mapping[str, Entry], cut: Cut | None) -> Iterator[Piece]:
    for group in groups:
        strands = []
        for name in group:
            entry = entries[name]
            rows, *columns = entry.shape
            taken = cut or tuple(slice(0, length) for length in entry.shape)
            stride = entry.nbytes // max(1, rows)
            width, skipped = stride, 0
            if len(columns) == 1:  # only a matrix is cut by columns
                item = stride // max(1, columns[0])
                width, skipped = (taken[1].stop - taken[1].start) * item, taken[1].start * item
            count = taken[0].stop - taken[0].start
            strands.append(Strand(str(entry.file), entry.offset + taken[0].start * stride + skipped, stride))
        if not width * count:
            continue
        if len(strands) == 1 and stride == width:
            yield run(strands[0].file, strands[0].offset, count * width)
        else:
            yield Piece(tuple(strands), width, count)
