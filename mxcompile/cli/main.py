"""The entry point: finds a verb, runs it, and turns every way it can end into an exit code.

Exit codes: 0 done; 1 a comparison disagrees; 2 wrong usage or input; 3 the machine lacks something (a library, disk
space, memory); 70 a fault of mxcompile itself; 130 interrupted; 141 the reader of the output went away; 143 terminated.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mxcompile.cli.errors import report

VERBS = {
    "build": "Compile a checkpoint into an engine directory.",
    "refit": "Give an engine the weights of another checkpoint of the same model, without building it again.",
    "run": "Generate with a built engine.",
    "serve": "Serve an engine with Triton Inference Server and an OpenAI-compatible API.",
    "triton": "Write a model repository for a Triton Inference Server that runs elsewhere.",
    "validate": "Compare an engine with the PyTorch definition of its checkpoint.",
    "bench": "Measure an engine: time to first token, time between tokens, memory, and how near it comes to what this "
    "machine can do.",
    "report": "Say on one page whether an engine is right, how fast it is beside the others, and what it costs.",
    "inspect": "Describe an engine directory, a checkpoint or an ONNX file.",
    "export": "Write the canonical ONNX graph of a checkpoint or a preset.",
    "checkpoint": "Create or verify a checkpoint.",
    "plan": "Say what a model needs on several GPUs: memory per rank, what fits and why not, and how fast it can be at "
    "best.",
    "doctor": "Say what this machine can build and run.",
    "plugins": "Build or list the CUDA kernels and the TensorRT plugin library.",
}
"""Verb -> its help line. The module `mxcompile.cli.VERB` holds its `command`."""
_SIGNALS = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}  # what each raises in the main thread
_AGAIN_S = 0.02
_ONCE_S = 5.0


class LazyGroup(click.Group):
    """A group that imports a verb's module only when that verb is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        from importlib import import_module

        return import_module(f"mxcompile.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from mxcompile import __version__

        click.echo(f"mxcompile {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Compile MiniMax-Text-01 checkpoints ahead of time into inference engines, and run them.

    Start with `mxcompile doctor`, then `mxcompile build CHECKPOINT -o ENGINE_DIR`.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    _open_standard_streams()
    _terminate_cleanly()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character must not end a generation
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(args)
        sys.stdout.flush()
    except BaseException as error:
        code = report(error)
    sys.exit(code)


def _run(args: list[str]) -> int:
    if "_MXCOMPILE_COMPLETE" in os.environ:  # the shell asks for completions
        cli.main(args, prog_name="mxcompile")
    if not args:
        args = ["--help"]
    # Not cli.main: it ends a closed pipe and much else with exit code 1, which here means that a comparison disagrees.
    with cli.make_context("mxcompile", args) as context:
        result: Any = cli.invoke(context)
    return result if isinstance(result, int) else 0


def _open_standard_streams() -> None:
    """Who closed one (`>&-`) wants nothing of it. Left closed, the next file that is opened would take its number, and what libraries
    print would end up in it: in an engine's weights, say.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:  # a lower one was free, too
                    os.dup2(opened, number)
                    os.close(opened)
                os.set_inheritable(number, True)
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _terminate_cleanly() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that half-written output is removed."""
    last = -math.inf

    def stop(number: int, frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _ONCE_S:  # `timeout` sends two at once: the second must not end the tidying up after the first
            last = now
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    before = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in a destructor or in the callback of a weak reference, and torch has many: a signal
        that arrives there comes once more, a moment later.
        """
        nonlocal last
        last = -math.inf
        number = next((n for kind, n in _SIGNALS.items() if isinstance(dropped.exc_value, kind)), None)
        if number is None:
            before(dropped)
        else:  # from another thread: raised in here it would be dropped again
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = again


if __name__ == "__main__":
    main()
