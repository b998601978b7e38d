"""Options that several verbs share. Nothing heavy is imported here: this file is read for every `--help`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mxcompile.cli.errors import set_debug

F = TypeVar("F", bound=Callable[..., Any])


class _Path(click.Path):
    """A path that is not empty (Path("") would be the working directory) and that libraries written in other languages can open."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path", param, context)
        try:
            os.fspath(value).encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"{value!r} is not UTF-8; rename it", param, context)
        return super().convert(value, param, context)


PATH = _Path(path_type=Path)
DTYPES = ("float32", "float16", "bfloat16")


class Verb(click.Command):
    """A command with the options that every verb has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=lambda ctx, param, value: set_debug(value),
                help="Show the traceback of an error.",
            )
        )


def together(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator out of several, shown in `--help` in the order given."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of tables.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say more on stderr, a line per finished stage.")
dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type of weights and activations."
)
layers_option = click.option(
    "--layers", type=int, metavar="N", help="Take the first N layers only; what they compute stays the same."
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads to use.  [default: all cores]"
)
prefill_chunk_option = click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Read long prompts in pieces of this many tokens; bounds memory, not results.",
)

limits_options = together(
    click.option(
        "--max-batch-size",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        metavar="ROWS",
        help="Most sequences in one batch.",
    ),
    click.option(
        "--max-seq-len",
        type=click.IntRange(min=2),
        default=4096,
        show_default=True,
        metavar="TOKENS",
        help="Most tokens of one sequence, prompt and output together.",
    ),
    prefill_chunk_option,
)

parallel_options = together(
    click.option(
        "--tp-size", type=int, default=1, show_default=True, metavar="N", help="Ranks that share the model by heads."
    ),
    click.option("--moe-tp-size", type=int, metavar="N", help="Of them, how many share each expert's inner width."),
    click.option("--moe-ep-size", type=int, metavar="N", help="Of them, how many share the experts out."),
    click.option(
        "--cp-size",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Ranks, each with the whole model (or sets of ranks), that share the tokens of a long prompt.",
    ),
)

sampling_options = together(
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        metavar="N",
        help="Stop after N tokens.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        metavar="T",
        help="0 takes the likeliest token; above 0, tokens are drawn.",
    ),
    click.option(
        "--top-k", type=click.IntRange(min=0), default=0, metavar="K", help="Draw from the K likeliest tokens."
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, min_open=True, max=1),
        default=1.0,
        metavar="P",
        help="Draw from the likeliest tokens that reach probability P together.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        metavar="X",
        help="Above 1: make tokens less likely that have been seen.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0, max=2**64 - 1), default=0, metavar="N", help="Seed of the draws."
    ),
    click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="Stop before this text; repeatable."),
    click.option(
        "--logprobs",
        type=click.IntRange(min=0),
        metavar="N",
        help="Report log-probabilities of each token and of the N likeliest.",
    ),
)
