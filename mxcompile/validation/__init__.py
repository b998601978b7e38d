"""Holding engines against the PyTorch definition: `validate` and what it returns."""

from mxcompile.validation.options import ValidationOptions
from mxcompile.validation.results import ValidationReport
from mxcompile.validation.run import validate

__all__ = ["ValidationOptions", "ValidationReport", "validate"]
