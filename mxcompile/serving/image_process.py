"""The process that decodes images: `python -m mxcompile.serving.image_process FD`, a child of the engine process.

Files come from anybody, and decoders are large programs in C. Here they have bounded memory, hold no lock that a decode step waits for,
and take nothing along when they crash or are killed for taking too long.

Messages in, over an inherited socket: first the vision half of the engine's configuration as JSON; then for each image its name and
its bytes. Messages out, for each image: JSON with "error", or with the "shape" and the original "size" of the tiles; then those, fp32.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from multiprocessing.connection import Connection

from engines.config import VisionHalf
from engines.errors import EngineError
from engines.vision.pixels import prepare
from mxcompile.child import limit

MOST_MEMORY = 4 << 30  # bytes of address space; the largest image takes a fourth of it


def main() -> int:
    """Serve the engine process at the other end until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal is for others to answer
    limit(resource.RLIMIT_AS, MOST_MEMORY)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold somebody's image
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):  # the engine process is gone
        vision = VisionHalf(**json.loads(connection.recv_bytes()))
        while True:
            name, data = connection.recv_bytes().decode(), connection.recv_bytes()
            _answer(connection, name, data, vision)
    return 0


def _answer(connection: Connection, name: str, data: bytes, vision: VisionHalf) -> None:
    try:
        image = prepare(data, vision, name)
    except EngineError as error:
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    shape = image.tiles_NCYX.shape
    connection.send_bytes(json.dumps({"shape": shape, "size": image.size}).encode())
    connection.send_bytes(image.tiles_NCYX.tobytes())


if __name__ == "__main__":
    sys.exit(main())
