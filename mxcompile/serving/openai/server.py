"""The OpenAI-compatible application on a port, in a thread of this process."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from types import TracebackType

import uvicorn

from mxcompile.errors import EnvironmentProblem
from mxcompile.serving.openai.app import create_app
from mxcompile.serving.openai.door import logger

_START_S = 30.0


class FrontServer:
    """Serves inside a with block; leaving it lets running requests end."""

    def __init__(
        self,
        host: str,
        port: int,
        triton: str,
        metrics: str,
        model: str,
        drain_s: int,
        family: str = "text-01",
        images: bool = False,
    ) -> None:
        """`drain_s`: seconds that running requests have to end. Raises EnvironmentProblem when the port is taken."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise EnvironmentProblem(f"{host}:{port} cannot be listened on: {error.strerror}") from error
        config = uvicorn.Config(
            create_app(triton, metrics, model, family, images),
            log_level="warning",
            timeout_graceful_shutdown=max(drain_s, 1),
        )
        self._server = uvicorn.Server(config)
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler(sys.stderr))
            logger.setLevel(logging.INFO)
            logger.propagate = False
        # Signals are the main thread's; uvicorn takes them only when it runs there.
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> FrontServer:
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise EnvironmentProblem("the OpenAI-compatible API did not start; its messages above say why")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        with contextlib.suppress(OSError):
            self._socket.close()
