"""What an answer may still become, step by step: the side of generation that a grammar has.

Legend: N vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.generation.settings import GenerationError


class ConstraintError(GenerationError):
    """No token can follow, or the constraint has become too costly to follow: the constraint's fault, not the engine's."""


class Constraint(Protocol):
    """Of one answer; it follows the tokens that are drawn."""

    def allowed(self) -> tuple[NDArray[np.bool_], bool]:
        """Tokens [N] that may come next, in an array of the caller's, and whether the answer may end here.

        Raises ConstraintError when that takes too much to find out.
        """

    def accept(self, token: int) -> None:
        """Go on with `token`, which does not end the answer. Raises ConstraintError when it was not allowed."""


def allowed_tokens(constraint: Constraint, stop_token_ids: tuple[int, ...]) -> NDArray[np.bool_]:
    """Tokens [N] that may be drawn: those of the constraint, and the ones that end an answer exactly where it may end."""
    allowed_N, may_end = constraint.allowed()
    for token in stop_token_ids:
        if token < allowed_N.shape[0]:
            allowed_N[token] = may_end
    return allowed_N
