"""The images of one request on their way from files to features, in small steps that other requests come between.

Legend: n places of images, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.interface import SteppedImageSession
from engines.vision.pixels import PreparedImage
from mxcompile.serving.image_reader import ImageReader, Reading
from mxcompile.serving.images import PromptImage


class Encoding:
    """Reads one image ahead of the one that the vision graph runs on. Belongs to the scheduler's thread."""

    def __init__(self, images: Sequence[PromptImage], reader: ImageReader, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, whenever `ready` may have become true."""
        self._images, self._reader, self._wake = list(images), reader, wake
        self._asked = 0
        self._reading: Reading | None = None
        self._steps: Generator[None, None, NDArray[np.float32]] | None = None
        self._features: list[NDArray[np.float32]] = []
        self.tiles = 0
        self._ask()

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self._images)

    @property
    def ready(self) -> bool:
        """Whether `advance` has something to do now."""
        return self._steps is not None or (self._reading is not None and self._reading.outcome is not None)

    def advance(self, session: SteppedImageSession) -> bool:
        """One run of the vision graph; True when it was the last one. Raises RequestError when the next image cannot be decoded."""
        if self._steps is None:
            assert self._reading is not None
            outcome = self._reading.outcome
            if not isinstance(outcome, PreparedImage):
                assert outcome is not None
                raise outcome
            self._ask()
            self.tiles += len(outcome.tiles_NCYX)
            self._steps = session.image_steps(outcome)
        try:
            next(self._steps)
        except StopIteration as end:
            self._steps = None
            self._features.append(end.value)
        return len(self._features) == len(self._images)

    def places(self, past: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Positions in a sequence whose first `past` tokens precede the prompt, and the features [n, D] for them, without those of
        its first `length` tokens, which are known.
        """
        positions_n = np.concatenate([np.arange(image.start, image.end) for image in self._images]) + past
        features_nD = self._features[0] if len(self._features) == 1 else np.concatenate(self._features)
        known = int(np.searchsorted(positions_n, length))
        return positions_n[known:], features_nD[known:]

    def drop(self) -> None:
        """Give up what was asked for; nothing may be called after this."""
        if self._reading is not None:
            self._reading.dropped = True

    def _ask(self) -> None:
        self._reading = None
        if self._asked < len(self._images):
            self._reading = self._reader.read(self._images[self._asked], self._wake)
            self._asked += 1
