"""`mxcompile run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxcompile.cli.options import PATH, Verb, json_option, prefill_chunk_option, sampling_options, threads_option

if TYPE_CHECKING:
    from engines.generation import GenerationResult, TokenEvent
    from mxcompile.guides import Guide
    from mxcompile.loading import LoadedEngine


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option("--prompt", metavar="TEXT", help="Continue this text.")
@click.option("--prompt-file", metavar="FILE", help="Continue the text of this file, as it is; - reads stdin.")
@click.option("--tokens", metavar="IDS", help="Continue these token ids: 1,2,3.")
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template; without a prompt, talk in turns.")
@click.option("--system", metavar="TEXT", help="System message of --chat.  [default: MiniMax's own; '' for none]")
@click.option(
    "--image",
    "images",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Image (PNG, JPEG or WebP) for the next <image> in the prompt; repeatable. --chat puts missing marks in front.",
)
@sampling_options
@click.option("--json-schema", metavar="FILE", help="Answer with JSON that follows this schema; - reads stdin.")
@click.option("--regex", metavar="EXPRESSION", help="Answer with what this expression matches as a whole.")
@click.option(
    "--grammar", metavar="FILE", help="Answer with what this grammar (Lark or GBNF) describes; - reads stdin."
)
@prefill_chunk_option
@threads_option
@click.option("--checkpoint", type=PATH, metavar="DIR", help="Where the engine's checkpoint lies now, if it was moved.")
@json_option
@click.option("--no-stream", is_flag=True, help="Print the text at the end instead of while it comes.")
def command(
    engine_dir: Path,
    prompt: str | None,
    prompt_file: str | None,
    tokens: str | None,
    chat: bool,
    system: str | None,
    images: tuple[Path, ...],
    as_json: bool,
    no_stream: bool,
    threads: int | None,
    checkpoint: Path | None,
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    **settings: Any,
) -> None:
    """Generate with a built engine.

    The text goes to stdout; a closing line on stderr tells its speed. Without a tokenizer in the engine, give and get
    token ids.
    """
    given = [name for name, value in _sources(prompt, prompt_file, tokens).items() if value is not None]
    talk = chat and not given
    if len(given) > 1:
        raise click.UsageError(f"give one of {', '.join(given)}", click.get_current_context())
    if talk and not (sys.stdin.isatty() and not as_json):
        raise click.UsageError("--chat without a prompt needs a terminal; give --prompt", click.get_current_context())
    if not given and not talk:
        raise click.UsageError("give --prompt, --prompt-file or --tokens, or --chat", click.get_current_context())
    if chat and tokens is not None:
        raise click.UsageError("--chat takes text, not --tokens", click.get_current_context())
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat", click.get_current_context())
    if images and talk:
        raise click.UsageError("--image needs a prompt; talking in turns takes text only", click.get_current_context())
    ids = None if tokens is None else _token_ids(tokens)
    text = _read(prompt_file, "--prompt-file") if prompt_file is not None else prompt
    guide = _guide(json_schema, regex, grammar)

    from engines.directory import read_config
    from engines.parallel.join import launched
    from mxcompile.loading import load

    started = launched()
    if started is not None:  # an engine of one rank would otherwise answer once per process
        started.check(read_config(engine_dir).mapping.ranks)
    engine = load(engine_dir, threads=threads, checkpoint=checkpoint)
    if guide is not None:
        settings["constraint"] = engine.guides.compile(guide)
    if talk:
        from mxcompile.cli.chat_loop import talk_in_turns

        talk_in_turns(engine, system, settings)
        return
    if chat:
        from mxcompile.chat import opening, render
        from mxcompile.image_prompts import marked

        text = render(opening(system, marked(text or "", len(images)), family=engine.family), family=engine.family)
    if images:
        settings["images"] = [list(images)]
    result = answer(engine, ids if ids is not None else text or "", settings, stream=not (no_stream or as_json))
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(result.to_dict())
    else:
        if no_stream:
            click.echo(result.text if result.text is not None else " ".join(map(str, result.tokens)))
        if settings["logprobs"] is not None:
            _print_logprobs(engine, result)
        close(result)


def answer(
    engine: LoadedEngine, prompt: str | list[int], settings: dict[str, Any], *, stream: bool, state: Any = None
) -> GenerationResult:
    """Run one prompt; with `stream`, write the text (or the ids) to stdout as it comes."""

    def show(event: TokenEvent) -> None:
        ended = event.finish_reason == "stop" and event.token in engine.eos_token_ids
        piece = event.text if engine.tokenizer is not None else ("" if ended else f"{event.token} ")
        click.echo(piece, nl=event.finish_reason is not None)

    generation = engine.start([prompt], state=state, **settings)
    for event in generation:
        if stream:
            show(event)
    return generation.results()[0]


def close(result: GenerationResult) -> None:
    """The line on stderr that ends an answer."""
    speed = f"{result.decode_tokens_per_s:.1f} tokens/s" if result.decode_tokens_per_s else "one token"
    click.echo(
        f"{result.prompt_tokens} prompt tokens, first token after {result.time_to_first_token_s * 1000:.0f} ms, "
        f"{len(result.tokens)} tokens at {speed} ({result.finish_reason})",
        err=True,
    )


def _print_logprobs(engine: LoadedEngine, result: GenerationResult) -> None:
    from mxcompile.cli.output import print_table

    def name(token: int) -> str:
        return f"{token} {engine.tokenizer.decode([token])!r}" if engine.tokenizer is not None else str(token)

    rows = [
        (name(token), f"{logprobs.chosen:.4f}", "  ".join(f"{name(i)} {value:.4f}" for i, value in logprobs.top))
        for token, logprobs in zip(result.tokens, result.logprobs, strict=True)
    ]
    print_table("Log-probabilities", ("token", "logprob", "likeliest"), rows)


def _sources(prompt: str | None, prompt_file: str | None, tokens: str | None) -> dict[str, str | None]:
    return {"--prompt": prompt, "--prompt-file": prompt_file, "--tokens": tokens}


def _guide(json_schema: str | None, regex: str | None, grammar: str | None) -> Guide | None:
    """What the answer must follow."""
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    found = [(name, value) for name, value in given.items() if value is not None]
    if not found:
        return None
    if len(found) > 1:
        raise click.UsageError(f"give one of {', '.join(name for name, _ in found)}", click.get_current_context())
    from mxcompile.guides import Guide

    name, value = found[0]
    return Guide(name.removeprefix("--").replace("-", "_"), value if name == "--regex" else _read(value, name))


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of token ids like 1,2,3", param_hint="--tokens") from None


def _read(name: str, option: str) -> str:
    """The text of a file, or of stdin for "-". It must be UTF-8."""
    from mxcompile.bounded import read_bounded

    try:
        return read_bounded(sys.stdin.buffer if name == "-" else name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{name} is not UTF-8 text (byte {error.start})", param_hint=option) from None
    except OSError as error:
        raise click.BadParameter(f"{name}: {error.strerror}", param_hint=option) from error
