"""`mxcompile inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, json_option

_TITLES = {"engine": "Engine", "checkpoint": "Checkpoint", "onnx": "ONNX file"}
_MOST_FILES = 40


@click.command(cls=Verb)
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read every byte of an engine's files and compare whole digests.")
@json_option
def command(path: Path, verify: bool, as_json: bool) -> None:
    """Describe an engine directory, a checkpoint or an ONNX file.

    Shows the architecture, parameters by kind, state bytes per sequence and per token, operators, inputs and outputs,
    and digests.
    """
    from mxcompile.inspection import inspect

    found = inspect(path, verify=verify)
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from mxcompile.cli.output import bytes_text, count_text, print_pairs, print_table

    plain = {key: value for key, value in found.items() if isinstance(value, str | int) and key != "total_bytes"}
    if "total_bytes" in found:
        plain["size"] = bytes_text(found["total_bytes"])
    print_pairs(f"{_TITLES[found['kind']]} {found['path']}", plain | _flattened(found))
    if "architecture" in found:
        print_pairs("Architecture", found["architecture"])
    parameters = found["parameters"]
    print_table("Parameters", ("kind", "count", ""), [(k, n, count_text(n)) for k, n in parameters.items()])
    if "state" in found:
        print_table("State", ("what", "bytes", ""), [(k, n, bytes_text(n)) for k, n in found["state"].items()])
    if "memory" in found:
        print_table(
            "Memory when loaded, full batch", ("rank", "what", "bytes", ""), list(_memory_rows(found["memory"]))
        )
    for name in ("inputs", "outputs"):
        if name in found:
            print_table(name.capitalize(), ("name", "type"), found[name].items())
    if found.get("operators"):
        print_table("Operators", ("operator", "nodes"), found["operators"].items())
    if found.get("plugins"):
        print_table("Plugins", ("plugin", "layers"), found["plugins"].items())
    if found.get("precision"):
        print_table("Precision", ("type", "values"), found["precision"].items())
    if found["kind"] == "engine":
        rows = [(name, bytes_text(f["bytes"]), f["sha256"]) for name, f in found["files"].items()]
        print_table("Files", ("file", "size", "sha256"), rows)
    elif found["kind"] == "checkpoint":
        print_table("Files", ("file", "size"), _file_rows(found["files"]))
        for problem in found["problems"]:
            click.echo(f"problem: {problem}")


def _file_rows(files: dict[str, int]) -> list[tuple[str, str]]:
    """A line per file, or one of all where a screen does not take them; --json has each."""
    from mxcompile.cli.output import bytes_text

    names = list(files)
    if len(names) <= _MOST_FILES:
        return [(name, bytes_text(size)) for name, size in files.items()]
    return [(f"{names[0]} to {names[-1]}, {len(names)} files", bytes_text(sum(files.values())))]


def _memory_rows(ranks: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    from mxcompile.cli.output import bytes_text

    for memory in ranks:
        parts = {name: value for name, value in memory.items() if name not in ("rank", "activations", "total")}
        parts |= {f"activations, {profile}": size for profile, size in memory.get("activations", {}).items()}
        if "total" in memory:
            parts["total, activations once per profile"] = memory["total"]
        for name, size in parts.items():
            yield memory["rank"], name, "?" if size is None else size, "" if size is None else bytes_text(size)


def _flattened(found: dict[str, Any]) -> dict[str, str]:
    """Small groups of values, one line each."""
    groups = ("quantization", "limits", "mapping", "checkpoint", "versions", "compiled_for", "stored_types", "opsets")
    return {
        name: ", ".join(f"{key} {value}" for key, value in found[name].items()) for name in groups if found.get(name)
    }
