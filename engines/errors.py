"""The one error type that users of engines see."""

from __future__ import annotations

USAGE = 2
DISAGREEMENT = 1
ENVIRONMENT = 3


class EngineError(Exception):
    """A problem that the user can act on; its text says what and how, and needs no traceback.

    `exit_code`: 2 bad input or usage, 1 a comparison that failed, 3 the environment (library, disk, memory).
    """

    def __init__(self, message: str, *, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
