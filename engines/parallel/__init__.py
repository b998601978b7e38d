"""Engines of several ranks on one CPU machine: one process per rank, the graph in pieces, MPI between the pieces.

`build` cuts each rank's lowered graph at its collectives; `load` starts the ranks and gives a session like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.parallel.build import build_ranks
    from engines.parallel.session import load

__all__ = ["build_ranks", "load"]


def __getattr__(name: str) -> Any:
    if name == "build_ranks":
        from engines.parallel.build import build_ranks

        return build_ranks
    if name == "load":
        from engines.parallel.session import load

        return load
    raise AttributeError(name)
