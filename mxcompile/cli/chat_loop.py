"""`mxcompile run --chat` on a terminal: a conversation in turns, whose state stays in the engine between them."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from engines.generation import GenerationError, GenerationResult
from mxcompile.chat import END, next_turn, opening, render
from mxcompile.cli.run import answer, close
from mxcompile.errors import MxcompileError
from mxcompile.loading import LoadedEngine

_HELP = "/new starts over, /exit (or Ctrl-D) leaves"


def talk_in_turns(engine: LoadedEngine, system: str | None, settings: dict[str, Any]) -> None:
    """Read lines and answer them until the input ends. Only what is new in a turn is computed."""
    if engine.tokenizer is None:
        raise MxcompileError("this engine has no tokenizer; --chat needs one")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    end = engine.tokenizer.token_id(END)
    click.echo(_HELP, err=True)
    state, last = engine.new_state(1), None
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if line == "/exit":
            return
        if line == "/new":
            state, last = engine.new_state(1), None
        if not line or line == "/new":
            continue
        try:
            last = answer(engine, _turn(engine, line, system, last, end), settings, stream=True, state=state)
        except GenerationError as error:
            click.echo(f"error: {error} ({_HELP})", err=True)
        else:
            close(last)


def _turn(
    engine: LoadedEngine, line: str, system: str | None, last: GenerationResult | None, end: int | None
) -> list[int]:
    """The tokens that the state has not seen: the end of the last answer, and the new turn."""
    if last is None:
        return engine.tokens(render(opening(system, line, family=engine.family), family=engine.family))
    return [*last.unfed_tokens, *engine.tokens(next_turn(line, answer_ended=last.stop_reason == end))]
