"""`mxcompile serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb
from mxcompile.cli.triton import serving_options, settings

PORT = click.IntRange(min=1, max=65535)


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--openai-port",
    type=click.IntRange(min=0, max=65535),
    default=9000,
    show_default=True,
    help="Port of the OpenAI-compatible API; 0 for none.",
)
@click.option("--http-port", type=PORT, default=8000, show_default=True, help="Triton's HTTP port.")
@click.option("--grpc-port", type=PORT, default=8001, show_default=True, help="Triton's gRPC port.")
@click.option("--metrics-port", type=PORT, default=8002, show_default=True, help="Triton's metrics port.")
@serving_options
@click.option(
    "--drain",
    "drain_s",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How long running requests may take to end when the server is stopped.",
)
@click.option(
    "--triton-venv",
    type=PATH,
    metavar="DIR",
    help="Environment that holds Triton; made on first use.  [default: MXCOMPILE_TRITON_VENV, else the user's cache]",
)
def command(
    engine_dir: Path,
    host: str,
    openai_port: int,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    name: str,
    drain_s: int,
    triton_venv: Path | None,
    **others: Any,
) -> None:
    """Serve an engine with Triton Inference Server and an OpenAI-compatible API.

    Runs until it gets SIGTERM or Ctrl-C; then takes no more requests, lets the running ones end, and exits with 0.
    """
    from engines.directory import read_config
    from mxcompile.serving.serve import Addresses, serve
    from mxcompile.serving.triton.environment import default_folder, find, install

    chosen = settings(**others)
    read_config(engine_dir)  # before minutes are spent on installing
    folder = triton_venv or default_folder()
    installation = find(folder)
    if installation is None:
        click.echo(f"Installing Triton Inference Server into {folder} (once) ...", err=True)
        installation = install(folder)
    addresses = Addresses(host, openai_port or None, http_port, grpc_port, metrics_port)
    serve(engine_dir, installation, addresses, name=name, settings=chosen, drain_s=drain_s, say=click.echo)
