"""One server from its start to its end: Triton, the OpenAI-compatible front, and what signals ask for."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.directory import read_config
from mxcompile.errors import EnvironmentProblem
from mxcompile.serving.triton.environment import TritonInstallation
from mxcompile.serving.triton.repository import write_repository
from mxcompile.serving.triton.server import TritonServer
from mxcompile.serving.worker import Settings

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Addresses:
    """Where to listen. `openai_port` None: no OpenAI-compatible front."""

    host: str = "127.0.0.1"
    openai_port: int | None = 9000
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002


def serve(
    engine: Path,
    installation: TritonInstallation,
    addresses: Addresses,
    *,
    name: str,
    settings: Settings,
    drain_s: int,
    say: Callable[[str], None],
) -> None:
    """Serve `engine` until SIGTERM or Ctrl-C, then drain. Raises MxcompileError when a server does not start or ends
    by itself.
    """
    at = addresses
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_signals())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mxcompile-serve-")))
        write_repository(engine, folder / "repository", name=name, settings=settings, link=True)
        server = TritonServer(
            installation,
            folder / "repository",
            host=at.host,
            http_port=at.http_port,
            grpc_port=at.grpc_port,
            metrics_port=at.metrics_port,
            drain_s=drain_s,
        )
        triton = stack.enter_context(server)
        triton.wait_ready(stop=stopping)
        if stopping.is_set():
            return
        if at.openai_port is not None:
            from mxcompile.serving.openai.server import FrontServer

            base = f"http://{at.host}:{at.http_port}"
            metrics = f"http://{at.host}:{at.metrics_port}/metrics"
            config = read_config(engine)
            family, images = str(config.model.get("family", "text-01")), config.vision is not None
            stack.enter_context(FrontServer(at.host, at.openai_port, base, metrics, name, drain_s, family, images))
            say(f"OpenAI API  http://{at.host}:{at.openai_port}/v1")
        say(f"Triton      {at.host}:{at.http_port} (HTTP), {at.host}:{at.grpc_port} (gRPC), model {name}")
        say(f"metrics     http://{at.host}:{at.metrics_port}/metrics")
        while not stopping.wait(_LOOK_EVERY_S):
            if (what := triton.lost()) is not None:
                raise EnvironmentProblem(f"{what}; its messages above say why. Start the server again")
        say("stopping: running requests may end")


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second SIGINT interrupts. A second SIGTERM does nothing, also behind the
    block: who asks twice while the process is ending must not make a failure of it.
    """
    stopping = threading.Event()

    def stop(number: int, frame: object) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            ending = stopping.is_set() and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ending else handler)
