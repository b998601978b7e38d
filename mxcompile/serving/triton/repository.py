"""Writes a model repository: everything that a Triton Inference Server needs to serve one engine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

from engines.directory import os_errors, read_config, verify_files
from mxcompile.errors import MxcompileError
from mxcompile.serving.worker import Settings

VERSION = "1"
_MARK = ".mxcompile-repository"  # what `force` may replace

COPIED = (
    ("triton/model.py", "model.py"),
    ("triton/request_tensors.py", "request_tensors.py"),
    ("wire.py", "wire.py"),
)

# name, type, dims, what it is
INPUTS = (
    ("text_input", "TYPE_STRING", 1, "The prompt as text; give this or input_ids."),
    ("input_ids", "TYPE_INT32", -1, "The prompt as token ids."),
    (
        "images",
        "TYPE_STRING",
        -1,
        "PNG, JPEG or WebP files for the <image> marks in the prompt; as bytes or in base64.",
    ),
    ("max_tokens", "TYPE_INT32", 1, "Tokens to generate at most. Default 128."),
    ("stream", "TYPE_BOOL", 1, "One response per token instead of one at the end. Default false."),
    ("temperature", "TYPE_FP32", 1, "0 takes the likeliest token (default); above 0, tokens are drawn."),
    ("top_k", "TYPE_INT32", 1, "Draw from the K likeliest tokens. Default 0: off."),
    ("top_p", "TYPE_FP32", 1, "Draw from the likeliest tokens that reach this probability. Default 1: off."),
    ("repetition_penalty", "TYPE_FP32", 1, "Above 1: make tokens less likely that have been seen. Default 1."),
    ("presence_penalty", "TYPE_FP32", 1, "Taken off the logit of every token of the answer so far. Default 0."),
    ("frequency_penalty", "TYPE_FP32", 1, "Taken off once for each time that a token stands there. Default 0."),
    ("seed", "TYPE_UINT64", 1, "Seed of the draws. Default 0."),
    ("stop_words", "TYPE_STRING", -1, "Texts to stop before."),
    ("logit_bias_ids", "TYPE_INT32", -1, "Tokens whose logits are changed, before penalties."),
    ("logit_bias_values", "TYPE_FP32", -1, "What is added to the logits of logit_bias_ids: -100 to 100 each."),
    (
        "guided_decoding_guide_type",
        "TYPE_STRING",
        1,
        "What the answer must follow: json (any object), json_schema, regex, choice or grammar.",
    ),
    (
        "guided_decoding_guide",
        "TYPE_STRING",
        1,
        "Its text: the schema, the expression, a JSON list of texts, or a grammar in Lark or GBNF.",
    ),
    ("end_id", "TYPE_INT32", 1, "Token that ends the answer; -1: none. Default: the model's own."),
    ("return_log_probs", "TYPE_BOOL", 1, "Also return output_log_probs. Default false."),
    ("top_log_probs", "TYPE_INT32", 1, "Also return token_details, with this many of the likeliest tokens (0 to 20)."),
    ("prompt_log_probs", "TYPE_BOOL", 1, "Let token_details begin with the prompt's tokens. Needs top_log_probs."),
    ("n", "TYPE_INT32", 1, "Answers to write, with seeds seed, seed + 1, ...; each response tells its choice_index."),
    ("echo", "TYPE_BOOL", 1, "Let text_output begin with the prompt. Default false."),
    ("client_id", "TYPE_STRING", 1, "Whom to be fair to. Default: the correlation id, if there is one."),
    ("request_id", "TYPE_STRING", 1, "A name for the log. Default: the id that the protocol carries."),
    ("session_id", "TYPE_STRING", 1, "Continue this conversation; the prompt holds only what is new."),
    ("session_start", "TYPE_BOOL", 1, "Begin session_id anew. Default false: it must exist."),
)
OUTPUTS = (
    ("text_output", "TYPE_STRING", 1, "New text of this response."),
    ("output_ids", "TYPE_INT32", -1, "New tokens of this response, without the one that ended the answer."),
    ("output_log_probs", "TYPE_FP32", -1, "Natural log-probabilities of output_ids."),
    (
        "token_details",
        "TYPE_STRING",
        -1,
        "JSON per token of output_ids: id, token, bytes, logprob, top (the likeliest).",
    ),
    ("choice_index", "TYPE_INT32", 1, "Which of several answers this response belongs to; only when n is above 1."),
    ("finish_reason", "TYPE_STRING", 1, "stop or length; in an answer's last response only, as what follows."),
    ("num_input_tokens", "TYPE_INT32", 1, "Tokens of the prompt, those that a session kept unfed included."),
    ("num_output_tokens", "TYPE_INT32", 1, "Tokens generated."),
    ("num_cached_tokens", "TYPE_INT32", 1, "Tokens whose state was known: not read again."),
)


def write_repository(
    engine: Path,
    repository: Path,
    *,
    name: str = "mxcompile",
    settings: Settings | None = None,
    python: str = sys.executable,
    link: bool = False,
    force: bool = False,
) -> Path:
    """Write `repository` with one model `name` that serves the engine directory `engine`; returns the model's folder.

    The engine is copied, or linked to with `link`. `python` runs the engine process; it must have mxcompile. Appears
    whole or not at all. Raises MxcompileError or EngineError for what cannot be written or is no engine.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise MxcompileError(f"{name!r} is no model name: letters, digits, dots, underscores and dashes")
    config = read_config(engine)
    verify_files(engine, config)
    settings = dataclasses.replace(settings or Settings(""), engine="engine")
    if os.path.lexists(repository) and not (repository.is_dir() and not any(repository.iterdir())):
        if not (repository / _MARK).is_file():
            raise MxcompileError(f"{repository}: exists and is no model repository of mxcompile; choose another folder")
        if not force:
            raise MxcompileError(f"{repository}: exists already; use --force to replace it")
    with os_errors(f"writing {repository}"):
        repository.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{repository.name}.partial-", dir=repository.parent))
        try:
            partial.chmod(0o755)
            version = partial / name / VERSION
            version.mkdir(parents=True)
            (partial / _MARK).write_text("")
            for source, target in COPIED:
                (version / target).write_text(_source(source))
            if link:
                (version / "engine").symlink_to(engine.resolve())
            else:
                shutil.copytree(engine, version / "engine", ignore=shutil.ignore_patterns("report"))
            (partial / name / "config.pbtxt").write_text(model_config(name, settings, python))
            (partial / "README.md").write_text(_readme(name, python))
            if os.path.lexists(repository):
                shutil.rmtree(repository)
            os.rename(partial, repository)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return repository / name


def model_config(name: str, settings: Settings, python: str) -> str:
    """The text of config.pbtxt."""
    lines = [
        "# Written by `mxcompile triton`. An engine process does the work: see 1/model.py.",
        f'name: "{name}"',
        'backend: "python"',
        "# Requests are joined inside the engine process, between any two tokens; Triton must not wait to join them.",
        "max_batch_size: 0",
        "# One response per token.",
        "model_transaction_policy { decoupled: true }",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        "",
    ]
    for ports, word in ((INPUTS, "input"), (OUTPUTS, "output")):
        for port, kind, dims, meaning in ports:
            optional = " optional: true" if word == "input" else ""
            lines += [f"# {meaning}", f'{word} [ {{ name: "{port}" data_type: {kind} dims: [ {dims} ]{optional} }} ]']
    lines += ["", "# The Python that has mxcompile; the environment variable MXCOMPILE_PYTHON overrides it."]
    lines.append(_parameter("python", python))
    lines.append("# Settings of the engine process, as JSON; null takes the default.")
    lines += [_parameter(key, json.dumps(value)) for key, value in dataclasses.asdict(settings).items()]
    return "\n".join(lines) + "\n"


def _parameter(key: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'parameters {{ key: "{key}" value {{ string_value: "{escaped}" }} }}'


def _source(name: str) -> str:
    return resources.files("mxcompile.serving").joinpath(name).read_text(encoding="utf-8")


def _readme(name: str, python: str) -> str:
    return f"""# Triton model repository: {name}

Start a server here (any Triton with the Python backend, 24.10 or newer):

    tritonserver --model-repository=. --disable-auto-complete-config

The engine runs in a process of its own, with the Python that `config.pbtxt` names (`{python}`) or that the
environment variable MXCOMPILE_PYTHON names. Install mxcompile there. Triton's own Python needs numpy below 2.

Ask it:

    curl -s localhost:8000/v2/models/{name}/generate -d '{{"text_input": "Hello", "max_tokens": 16}}'
    curl -sN localhost:8000/v2/models/{name}/generate_stream -d '{{"text_input": "Hello", "max_tokens": 16, "stream": true}}'

All inputs and outputs are described in `{name}/config.pbtxt`. Over gRPC, use `stream_infer`: the model is decoupled.
Metrics: port 8002, those that start with `mxcompile_`.
"""
