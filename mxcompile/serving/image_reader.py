"""Image files to tiles, in another process and in the order in which they were asked for."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from engines.config import VisionHalf
from engines.vision.layout import token_rows
from engines.vision.pixels import PreparedImage
from mxcompile.child import Child
from mxcompile.serving.images import PromptImage
from mxcompile.serving.requests import RequestError

READ_LIMIT_S = 60.0  # an image of the largest size takes a few seconds


@dataclass(eq=False)
class Reading:
    """One image on its way. `outcome` is set by the reader's thread, which then calls `ready`."""

    image: PromptImage
    ready: Callable[[], None]
    outcome: PreparedImage | RequestError | None = field(default=None, init=False)
    dropped: bool = field(default=False, init=False)


class ImageReader:
    """Has images decoded by a child process, which is started for the first one, and again when it ended."""

    def __init__(self, vision: VisionHalf, limit_s: float = READ_LIMIT_S) -> None:
        """`limit_s`: seconds that one image may take before its decoder is killed."""
        self.vision = vision
        self._limit_s = limit_s
        self._asked: queue.SimpleQueue[Reading | None] = queue.SimpleQueue()
        self._child = Child("mxcompile.serving.image_process", json.dumps(asdict(vision)).encode())
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def read(self, image: PromptImage, ready: Callable[[], None]) -> Reading:
        """Begin to read an image; `ready` is called from another thread once the outcome is there. Set `dropped` to give it up."""
        reading = Reading(image, ready)
        self._asked.put(reading)
        return reading

    def close(self) -> None:
        """End the process, after what was asked for."""
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (reading := self._asked.get()) is not None:
            if reading.dropped:
                continue
            try:
                reading.outcome = self._read(reading.image)
            except RequestError as error:
                reading.outcome = error
            except Exception as error:  # else this request, and all later ones, would wait for ever
                reading.outcome = RequestError(f"{reading.image.name}: could not be read ({error!r})", "internal")
                self._child.close()
            reading.ready()
        self._child.close()

    def _read(self, image: PromptImage) -> PreparedImage:
        connection, process = self._child.started()
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        limit = threading.Timer(self._limit_s, kill)
        limit.start()
        try:
            connection.send_bytes(image.name.encode())
            connection.send_bytes(image.data)
            head = json.loads(connection.recv_bytes())
            tiles = None if "error" in head else np.frombuffer(connection.recv_bytes(), np.float32)
        except (EOFError, OSError):
            self._child.close()
            why = f"takes longer than {self._limit_s:g} s" if late.is_set() else "ended its decoder"
            raise RequestError(f"{image.name}: the image {why}; save it anew with another program") from None
        finally:
            limit.cancel()
        if tiles is None:
            raise RequestError(head["error"])
        if tuple(head["size"]) != image.size:
            raise RequestError(f"{image.name}: the image is damaged (its head gives another size than its pixels)")
        return PreparedImage(image.name, image.size, tiles.reshape(head["shape"]), token_rows(image.size, self.vision))
