"""Tables and numbers for people, JSON for machines. rich is imported only when a table is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click


def print_json(values: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """A table of names and values."""
    print_table(title, (), [(name, value) for name, value in pairs.items()])


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout, of unlimited width when that is no terminal. Without `columns` there is no head."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    cells = [[escape(str(cell)) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=bool(columns))
    for index in range(len(columns) or max((len(row) for row in cells), default=1)):
        numeric = index > 0 and all(row[index][:1].isdigit() for row in cells if len(row) > index)
        header = columns[index] if columns else ""
        table.add_column(header, justify="right" if numeric and columns else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    # A pipe has no width: wrapping there would break lines that grep should find whole.
    width = (
        None
        if sys.stdout.isatty()
        else max(200, 8 + max((sum(map(len, row)) + 4 * len(row) for row in cells), default=0))
    )
    Console(width=width).print(table)


def bytes_text(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: int) -> str:
    """1234567 -> "1.23 M"."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(count)
