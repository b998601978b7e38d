"""`--config FILE`: a TOML or JSON file whose keys are the verb's long options. Options on the command line win."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import click

from mxcompile.errors import MxcompileError

_LARGEST_FILE = 1 << 20  # bytes


def config_option(*excluded: str) -> Any:
    """The option itself, for a command whose other options may all stand in the file, except `excluded`."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        metavar="FILE",
        callback=lambda ctx, param, value: _apply(ctx, value, {"config", "debug", "help", *excluded}),
        help="Take options from a TOML or JSON file; what is given here wins.",
    )


def _apply(ctx: click.Context, path: Path | None, excluded: set[str]) -> None:
    if path is None:
        return
    options = {
        option.opts[-1].lstrip("-").replace("-", "_"): option
        for option in ctx.command.params
        if isinstance(option, click.Option)
    }
    known = {name: option for name, option in options.items() if name not in excluded}
    defaults = {}
    for key, value in _read(path).items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            raise MxcompileError(f"{path}: unknown key {key!r}; known: {', '.join(sorted(known))}")
        defaults[str(option.name)] = _checked(path, key, option, value)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise MxcompileError(f"{path}: {error.strerror}") from error
    if len(data) > _LARGEST_FILE:
        raise MxcompileError(f"{path} is larger than {_LARGEST_FILE} bytes; a configuration file is small")
    try:
        text = data.decode("utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise MxcompileError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(values, dict):
        raise MxcompileError(f"{path} must hold one JSON object")
    return values


def _checked(path: Path, key: str, option: click.Option, value: Any) -> Any:
    """The value, if it has the type of the option: click alone would take 2.5 for 2 and "no" for a flag."""
    if option.is_flag:
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(option.type, click.types.IntParamType):
        expected, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(option.type, click.types.FloatParamType):
        expected, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        expected, fits = "a string", isinstance(value, str)
    if not fits:
        raise MxcompileError(f"{path}: {key} must be {expected}, not {value!r}")
    return value
