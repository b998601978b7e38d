"""One place that turns an exception into a line on stderr and an exit code. No traceback unless `--debug` asks for
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys

import click

USAGE, ENVIRONMENT, INTERNAL, INTERRUPTED = 2, 3, 70, 130
PIPE_CLOSED = 141  # as the shell reports a program that SIGPIPE ended: `mxcompile ... | head`
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# What `pip install 'mxcompile[EXTRA]'` brings, by the module whose import failed.
_EXTRAS = {
    "torch": "build",
    "onnx": "build",
    "onnx_ir": "build",
    "onnxscript": "build",
    "safetensors": "build",
    "fastapi": "serve",
    "httpx": "serve",
    "pydantic": "serve",
    "uvicorn": "serve",
    "transformers": "transformers",
    "tensorrt_rtx": "tensorrt-rtx",
    "cuda": "tensorrt-rtx",
    "PIL": "vision",
    "llguidance": "structured",
}


def report(error: BaseException) -> int:
    """Print what happened, if anything is to be said; returns the exit code."""
    code, message = describe(error)
    if code == PIPE_CLOSED:
        # Python flushes stdout once more on its way out, so give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if debugging() and message and code != INTERRUPTED:
        import traceback

        traceback.print_exception(error)
    if message:
        with contextlib.suppress(OSError):  # nobody may be reading stderr either
            click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def describe(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an exception; an empty line where silence is right."""
    if isinstance(error, ImportError) and isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
        error = error.__cause__  # a signal while a library was starting
    match error:
        case BrokenPipeError():
            return PIPE_CLOSED, ""
        case SystemExit() if isinstance(error.__context__, BrokenPipeError):  # how rich ends a closed pipe
            return PIPE_CLOSED, ""
        case click.exceptions.Exit() | SystemExit():
            code = error.exit_code if isinstance(error, click.exceptions.Exit) else error.code
            return (code, "") if isinstance(code, int) else (0 if code is None else 1, str(code or ""))
        case click.Abort() | KeyboardInterrupt():
            return INTERRUPTED, "interrupted"
        case click.exceptions.NoArgsIsHelpError():
            return USAGE, f"give a command (see: {error.ctx.command_path if error.ctx else 'mxcompile'} --help)"
        case click.UsageError():
            where = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
            return USAGE, error.format_message().rstrip() + where
        case click.ClickException():
            return error.exit_code, error.format_message()
        case UnicodeEncodeError() if "surrogates" in error.reason:
            # Python keeps the bytes of such a name as surrogates.
            return USAGE, f"a name is not UTF-8, somewhere in {error.object!r:.300}; rename it"
        case MemoryError():
            return ENVIRONMENT, "out of memory; build fewer layers or use a machine with more"
        case ImportError() if (extra := _EXTRAS.get((error.name or "").split(".")[0])) is not None:
            return ENVIRONMENT, f"this needs {error.name}; install it with: pip install 'mxcompile[{extra}]'"
    declared = getattr(error, "exit_code", None)
    if isinstance(declared, int):
        return declared, str(error)
    if isinstance(error, OSError):
        return _describe_os_error(error)
    return INTERNAL, (
        f"internal error: {type(error).__name__}: {error}; "
        "this is a fault of mxcompile: run again with --debug and report the traceback"
    )


def _describe_os_error(error: OSError) -> tuple[int, str]:
    name = f"{error.filename}: " if error.filename else ""
    if error.errno in _DISK_FULL:
        return (
            ENVIRONMENT,
            f"{name}the disk is full; free space or choose another folder, nothing was left half-written",
        )
    if error.errno == errno.EFBIG:
        return (
            ENVIRONMENT,
            f"{name}a file becomes larger than this file system or a limit (ulimit -f) allows; choose another folder",
        )
    if error.errno == errno.ENOMEM:
        return ENVIRONMENT, "out of memory; build fewer layers or use a machine with more"
    return USAGE, f"{name}{error.strerror or error}"


_debug = False


def debugging() -> bool:
    """Whether tracebacks are wanted: `--debug`, or MXCOMPILE_DEBUG set to something but 0."""
    return _debug or os.environ.get("MXCOMPILE_DEBUG", "0") not in ("", "0")


def set_debug(value: bool) -> None:
    """What `--debug` calls."""
    global _debug
    _debug = _debug or value


def warn(message: str) -> None:
    """One line on stderr beside the result."""
    print(f"warning: {message}", file=sys.stderr)
