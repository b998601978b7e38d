"""Files of results whose fields are wrong: refused by the name of the file and the field, before anything is written."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from bench_models import made_bench, made_drift, made_needle, made_perplexity
from hypothesis import given, settings
from hypothesis import strategies as st

from mxcompile.comparing import report, write
from mxcompile.errors import MxcompileError
from mxcompile.validation import ValidationOptions, validate

GONE = object()
KINDS = ("bench", "baseline", "needle", "perplexity", "state_drift", "validation")
BAD = (
    None,
    "x",
    "",
    -1,
    0,
    2.5,
    -1e-9,
    1e308,
    1e70,
    10**30,
    10**9,
    math.nan,
    math.inf,
    True,
    [],
    {},
    [None],
    [[]],
    "\ud800",
    GONE,
)


@pytest.fixture(scope="module")
def documents(engine, checkpoint, tmp_path_factory):
    """A good document of every kind, and the folder that they lie in."""
    folder = tmp_path_factory.mktemp("results")
    bench = made_bench(engine).to_dict()
    found = {
        "bench": bench,
        "baseline": bench,
        "needle": made_needle(engine).to_dict(),
        "perplexity": made_perplexity(engine).to_dict(),
        "state_drift": made_drift(engine).to_dict(),
        "validation": validate(engine, checkpoint, ValidationOptions(quick=True, lengths=(20,), threads=2)).to_dict(),
    }
    (folder / "good.json").write_text(json.dumps(bench))
    return folder, found


def places(values, path=()):
    """The path of everything in a document; of a list, of its first entry and what is in it."""
    items = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_change(values, path, bad):
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if bad is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = bad
    return values


def say(folder, kind, values):
    """Report on one file in every form."""
    (folder / "bad.json").write_text(json.dumps(values))
    file = folder / "bad.json"
    given = {"bench": [folder / "good.json"], "baseline": file} if kind == "baseline" else {kind: [file]}
    forms = {name: folder / f"out.{name}" for name in ("html", "json", "csv", "markdown")}
    for path in forms.values():
        path.unlink(missing_ok=True)
    try:
        write(report(price_per_hour=2.0, **given), **forms)
    except MxcompileError:
        assert not any(path.exists() for path in forms.values())
        raise
    assert all(path.exists() for path in forms.values())


@pytest.mark.parametrize(
    ("kind", "path", "bad", "field"),
    [
        ("bench", ("cells", 0, "summary", "ttft_s", "median"), "x", "cells[0].summary.ttft_s.median"),
        ("bench", ("cells", 0, "summary", "ttft_s", "interval", "passes"), 10**9, "ttft_s.interval.passes"),
        ("bench", ("cells", 0, "bound"), [1], "cells[0].bound"),
        ("bench", ("rates", 0, "copy_bytes_per_s"), math.nan, "rates[0].copy_bytes_per_s"),
        ("bench", ("engine", "model", "num_key_value_heads"), 0, "engine.model"),
        ("bench", ("environment", "later", "inner"), [1.0, math.inf], "environment.later.inner[1]"),
        ("bench", ("options", "backends"), GONE, "options.backends"),
        ("baseline", ("cells", 0, "summary", "peak", "median"), 0, "cells[0].summary.peak.median"),
        ("needle", ("limit",), "1", "limit"),
        ("needle", ("not_run", 0, "reason"), GONE, "not_run[0].reason"),
        ("perplexity", ("sides", 0, "nll", 0, 1), True, "sides[0].nll[0][1]"),
        ("state_drift", ("rows", 1, "errors", 0, "measure"), "plain", "rows[1].errors"),
        ("state_drift", ("created",), "\ud800", "created"),
        ("validation", ("thresholds", "limits", "kl", "reason"), None, "thresholds.limits.kl.reason"),
        ("validation", ("positions", 0, "margin"), [], "positions[0]"),
    ],
)
def test_the_file_and_the_field_are_named(documents, kind, path, bad, field):
    folder, good = documents
    values = copy.deepcopy(good[kind])
    if kind == "bench":
        values["environment"]["later"] = {"inner": 1}
    with pytest.raises(MxcompileError, match=rf"bad\.json: \S*{re.escape(field)}: .* again$"):
        say(folder, kind, with_change(values, path, bad))


@settings(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(KINDS), bad=st.sampled_from(BAD))
def test_one_wrong_value_is_reported_on_or_refused(documents, data, kind, bad):
    folder, good = documents
    path = data.draw(st.sampled_from(list(places(good[kind]))))
    refused = ""
    try:
        say(folder, kind, with_change(good[kind], path, bad))
    except MxcompileError as error:
        refused = f"{error.exit_code} {error}"
    assert not refused or refused.startswith(f"2 {folder / 'bad.json'}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_good_documents_are_reported_on(documents, kind):
    folder, good = documents
    say(folder, kind, good[kind])
