"""Pieces of a page: sections, tables, and numbers that say where they stand in the JSON form (`data-key`, `data-value`)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

_CODE = re.compile("`([^`]+)`")


def section(title: str, content: str) -> str:
    """A part of the page with a heading."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def header(first: str, *columns: str) -> str:
    """The head of a table of numbers."""
    cells = "".join(f'<th scope="col" class="n">{escape(name.strip())}</th>' for name in columns)
    return f'<thead><tr><th scope="col">{escape(first)}</th>{cells}</tr></thead>'


def scroll(head: str, lines: Sequence[str]) -> str:
    """A table that scrolls where the page is narrower."""
    return f'<div class="scroll"><table class="stack">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def cell(name: str, key: str, value: Any, show: Callable[[Any], str]) -> str:
    """A value in a table, or an empty place. `name`: of its column; `key`: where it stands in the JSON form."""
    if value is None or value == "":
        return "<td></td>"
    return f'<td class="n" data-name="{escape(name.strip())}" {_data(key, value)}>{show(value)}</td>'


def bullets(items: Iterable[str]) -> str:
    """A list of sentences, with what stands between backticks as code."""
    shown = (_CODE.sub(r"<code>\1</code>", escape(item)) for item in items)
    return "<ul>" + "".join(f"<li>{item}</li>" for item in shown) + "</ul>"


def value(key: str, value: Any, text: str) -> str:
    """A value in running text."""
    return f"<span {_data(key, value)}>{escape(text)}</span>"


def _data(key: str, value: Any) -> str:
    return f'data-key="{escape(key)}" data-value="{escape(json.dumps(value))}"'
