"""Validation reports for people and machines: terminal, JSON, and one self-contained HTML page."""

from mxcompile.report.files import read_json, write_json
from mxcompile.report.html import page, write_html
from mxcompile.report.terminal import print_report

__all__ = ["page", "print_report", "read_json", "write_html", "write_json"]
