"""Digests of engine files: whole for small ones, sampled for weights that are too big to read at every load.

A sampled digest covers the size and 64 blocks of 64 KiB evenly spread from first to last byte: it finds a file
that was truncated, replaced or rebuilt, not one flipped bit. The whole digest is checked on demand.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 64 * 1024
BLOCKS = 64
WHOLE_LIMIT = 64 * 1024 * 1024  # files up to this size are always checked whole


def sha256(path: Path) -> str:
    """Digest of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled(path: Path) -> str:
    """Digest of the size and of evenly spaced blocks; equal to a digest of all bytes for small files."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            digest.update(file.read())
        else:
            for index in range(BLOCKS):
                file.seek((size - BLOCK) * index // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
