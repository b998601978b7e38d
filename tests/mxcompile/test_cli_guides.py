"""`mxcompile run` with a schema, an expression and a grammar."""

from __future__ import annotations

import json
import re
import sys

import jsonschema
import pytest

from mxcompile.cli.main import main
from mxcompile.guides import Guide
from mxcompile.loading import load

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ASK = ("--prompt", "The lightning", "--temperature", "1", "--max-new-tokens", "90")


def exit_code(engine, *arguments):
    """Of the command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["run", str(engine), *ASK, *arguments])
    return ended.value.code


def test_an_answer_that_follows_a_schema(mxcompile, tiny_engine, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    done = mxcompile("run", tiny_engine, *ASK, "--json-schema", tmp_path / "schema.json")
    assert done.returncode == 0, done.stderr
    assert "(stop)" in done.stderr
    jsonschema.validate(json.loads(done.stdout), SCHEMA)
    result = load(tiny_engine, threads=1).generate(
        "The lightning", temperature=1.0, max_new_tokens=90, guide=Guide("json_schema", json.dumps(SCHEMA))
    )
    assert result.text + "\n" == done.stdout


def test_an_answer_that_an_expression_matches(tiny_engine, capsys):
    assert exit_code(tiny_engine, "--regex", "[a-c]{3}-[0-9]{2}", "--no-stream") == 0
    assert re.fullmatch("[a-c]{3}-[0-9]{2}\n", capsys.readouterr().out)


def test_an_answer_of_a_grammar_from_a_pipe(mxcompile, tiny_engine):
    grammar = 'root ::= "yes" | "no, " [a-z] [a-z]\n'
    done = mxcompile("run", tiny_engine, *ASK, "--grammar", "-", input=grammar)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("yes\n|no, [a-z]{2}\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--regex", "a{"), "regex: at 1(8): invalid regex"),
        (("--json-schema", "/nowhere/schema.json"), "--json-schema: /nowhere/schema.json: No such file"),
        (("--regex", "a", "--grammar", "-"), "give one of --regex, --grammar"),
    ],
)
def test_refusals(tiny_engine, capsys, arguments, message):
    assert exit_code(tiny_engine, *arguments) == 2
    assert message in capsys.readouterr().err


def test_without_the_library_the_extra_is_named(tiny_engine, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert exit_code(tiny_engine, "--regex", "a") == 3
    assert "pip install 'mxcompile[structured]'" in capsys.readouterr().err
