"""The written pages keep to what is there: links lead somewhere, commands and options exist, files that are named are in the tree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_process import ROOT

from mxcompile.cli.main import VERBS, cli

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(path for folder in ("benchmarks", "plugins", "tests") for path in ROOT.glob(f"{folder}/**/*.py"))
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
_FOLDERS = ("model_defs/", "export/", "engines/", "plugins/", "mxcompile/", "tests/", "benchmarks/", "docs/")


def page_text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[str]:
    """Lines of code set apart, continued ones joined."""
    fenced = [found[2] for found in _FENCED.finditer(text)]
    indented = re.findall(r"^    (.*)$", _FENCED.sub("", text), re.MULTILINE)
    for lines in [*fenced, "\n".join(indented)]:
        yield from lines.replace("\\\n", " ").splitlines()


def commands(text: str) -> list[list[str]]:
    """The words behind `mxcompile` in every command that is set apart."""
    found = []
    for line in blocks(text):
        match = re.match(r"\s*(?:\$ )?mxcompile ([a-z].*)", line)
        if match:
            found.append(shlex.split(match[1], comments=True))
    return found


def anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def verb_of(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0]) if words else None
        if found is None:
            raise click.UsageError("no such command")
        command, words = found, words[1:]
    return command, words


def all_commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from all_commands(found)


def dead_links(page: Path, text: str) -> Iterator[str]:
    for link in _LINK.findall(_FENCED.sub("", text)):
        if "://" in link:
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        headings = (
            re.findall(r"^#+ (.*)$", _FENCED.sub("", page_text(target)), re.MULTILINE) if target.is_file() else []
        )
        if not target.exists() or (place and place not in map(anchor, headings)):
            yield link


def refused_commands(page: Path, text: str) -> Iterator[str]:
    """Each goes through the real command's own parser, and nothing of it runs."""
    for words in commands(text):
        try:
            command, rest = verb_of(words)
            command.make_context(words[0], list(rest)).close()
        except click.ClickException as error:
            yield f"{shlex.join(words)}: {error.format_message()}"


def unknown_options(page: Path, text: str) -> Iterator[str]:
    """In sentences. Options of our commands or scripts."""
    known = {name for command in all_commands(cli) for option in command.params for name in option.opts}
    for path in SCRIPTS:
        known.update(re.findall(r"add_argument\(\s*\"(--[a-z0-9-]+)\"", path.read_text(encoding="utf-8")))
    for span in re.findall(r"`([^`\n]+)`", _FENCED.sub("", text)):
        words = span.split()
        if words[0] == "mxcompile" and len(words) > 1 and words[1] in VERBS:
            command, _ = verb_of([word for word in words[1:] if not word.startswith("-")])
            own = {name for option in command.params for name in option.opts}
            yield from set(_OPTION.findall(span)) - own
        elif words[0].startswith("-"):
            yield from (name for name in _OPTION.findall(span) if name not in known)


def missing_files(page: Path, text: str) -> Iterator[str]:
    for name in re.findall(r"[\w./*{},-]+\.(?:py|json|md|cu|cuh|cpp|txt|svg)\b", text):
        if name.startswith(_FOLDERS) and "{" not in name and not list(ROOT.glob(name)):
            yield name
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        ours = f"{module.split('.')[0]}/" in _FOLDERS
        if ours and not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            yield module


CHECKS = (dead_links, refused_commands, unknown_options, missing_files)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_is_there(page, check):
    assert list(check(page, page_text(page))) == []


@pytest.mark.parametrize(
    ("check", "text", "found"),
    [
        (dead_links, "[a](absent.md) [b](status.md#nowhere) [c](status.md#cuda-kernels)", 2),
        (refused_commands, "    mxcompile build C -o E --quick\n\n```\n$ mxcompile run E\n```\n    mxcompile rum E", 2),
        (unknown_options, "`--quietly` and `mxcompile run --quick` but `mxcompile validate --quick`, `--image`", 2),
        (missing_files, "`engines/absent.py`, `engines/config.py`, python -m plugins.bild, python -m plugins.build", 2),
    ],
)
def test_what_is_not_there_is_found(check, text, found):
    assert len(list(check(ROOT / "docs" / "page.md", text))) == found


def test_the_front_page_names_every_verb():
    named = page_text(ROOT / "README.md")
    assert [verb for verb in VERBS if f"| `{verb}" not in named and f", `{verb}" not in named] == []
