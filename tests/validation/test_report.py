"""Reports: JSON that comes back unchanged, and a page that stands alone and shows every figure."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from plain_models import plain_checkpoint
from rich.console import Console

from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.backends.weights import load_model
from mxcompile.errors import MxcompileError
from mxcompile.report import page, print_report, read_json, write_html, write_json
from mxcompile.report.figures import figures
from mxcompile.report.svg import Axis, Series, chart, number
from mxcompile.validation import ValidationOptions, ValidationReport, validate


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One that passes with small errors (fp32 against fp64), and one that fails."""
    checkpoint = plain_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")
    limits = {"threads": 1, "max_seq_len": 320, "max_batch_size": 4}
    options = ValidationOptions(quick=True, lengths=(1, 65), threads=1, reference_dtype="float64")
    good = PyTorchSession.load(checkpoint, **limits)
    faulty = load_model(checkpoint, checkpoint.config)
    with torch.no_grad():
        faulty.layers[1].self_attn.norm.weight[:] = 1.0
    passing = validate(good, checkpoint, options)
    return {"passing": passing, "failing": validate(PyTorchSession(faulty, **limits), checkpoint, options)}


@pytest.fixture(params=["passing", "failing"])
def report(request, reports):
    assert reports[request.param].passed == (request.param == "passing")
    return reports[request.param]


def test_json_comes_back_unchanged(report, tmp_path):
    write_json(report, tmp_path / "new" / "report.json")
    again = read_json(tmp_path / "new" / "report.json")
    assert again.to_dict() == report.to_dict()
    assert (again.passed, again.verdict) == (report.passed, report.verdict)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a validation report"),
        ('{"schema": "mxcompile.validation", "schema_version": 99}', "schema version 99"),
        ('{"schema": "mxcompile.validation", "schema_version": 1}', "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(MxcompileError, match=message):
        read_json(tmp_path / "r.json")


class Elements(HTMLParser):
    """Counts elements, collects attributes and text, and checks that elements are closed in order."""

    EMPTY = frozenset({"meta", "line", "rect", "circle", "path", "polyline", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone(report, tmp_path):
    write_html(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    found = Elements(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def test_the_page_shows_every_figure_and_number(report):
    found = Elements(page(report))
    drawn = figures(report)
    assert [figure.name for figure in drawn] == [
        "by-layer",
        "inside-layers",
        "by-position",
        "kl-by-position",
        "margins",
        "by-length",
        "greedy",
    ]
    assert all(figure.svg for figure in drawn)
    assert found.tags.count("figure") == found.tags.count("svg") == len(drawn)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 2 * len(drawn)  # a title and a description each
    words = " ".join(found.words)
    assert report.verdict in words
    for check in report.checks:
        for measure in check.measures:
            assert number(measure.value) in words
    assert report.engine["checkpoint"] is None or report.engine["checkpoint"]["fingerprint"] in words
    if report.fault is not None:
        assert f"layer {report.fault.layer}, the {report.fault.kind}" in words
        assert "first difference" in words


def test_the_terminal_says_the_same(report):
    out = io.StringIO()
    print_report(report, Console(file=out, width=200))
    text = out.getvalue()
    assert text.splitlines()[-1] == report.verdict
    for group in {check.group for check in report.checks}:
        assert group in text
    assert ("FAIL" in text) == (not report.passed)


def test_markup_in_names_is_text(reports):
    values = reports["passing"].to_dict()
    values["environment"]["cpu"] = "<script>alert(1)</script> & co"
    text = page(ValidationReport.from_dict(values))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_report_full_of_nothing_finite_still_draws(reports):
    values = json.loads(json.dumps(reports["failing"].to_dict()))
    for curve in values["positions"]:
        curve["max_abs"] = [None] * len(curve["max_abs"])
        curve["kl"] = [None] * len(curve["kl"])
    for check in values["checks"]:
        for measure in check["measures"]:
            measure["value"] = None
    broken = ValidationReport.from_dict(values)
    assert "not finite" in page(broken)
    assert broken.to_dict()["positions"][0]["max_abs"][0] is None


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_charts_of_any_length_stay_inside(count):
    x = list(range(count))
    svg = chart(
        "n", "t", "d", [Series("s", x, [10.0 ** -(i % 7) for i in x])], Axis("x", integer=True), Axis("y", log=True)
    )
    places = [
        tuple(map(float, pair.split(","))) for points in re.findall(r'points="([^"]+)"', svg) for pair in points.split()
    ]
    assert all(0 <= a <= 460 and 0 <= b <= 270 for a, b in places)
    assert len(svg) < 60_000


def test_numbers_are_short():
    cases = {
        0: "0",
        1000: "1000",
        0.25: "0.25",
        2e-4: "2e-4",
        1.2345e-5: "1.2e-5",
        123456.0: "1.2e5",
        math.inf: "not finite",
    }
    assert {value: number(value) for value in cases} == cases
