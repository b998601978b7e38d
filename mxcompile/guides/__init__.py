"""Answers that follow a JSON schema, a regular expression, a choice or a grammar, by the library llguidance."""

from mxcompile.guides.guide import Guide, GuideError, Kind

__all__ = ["Guide", "GuideError", "Kind"]
