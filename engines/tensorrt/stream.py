"""A plan that TensorRT hands over piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Write = Callable[[bytes], Any]


def make_writer(trt: Any, write: Write) -> Any:
    """TensorRT's stream writer over `write`.

    TensorRT calls a build successful even where its writer failed: look at `.error`, and compare `.size` with 0.
    """

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: BaseException | None = None
            self.size = 0

        def write(self, data: bytes) -> int:
            try:
                write(data)
            except BaseException as error:  # must not pass through TensorRT
                self.error = error
                return 0
            self.size += len(data)
            return len(data)

    return Writer()
