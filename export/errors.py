"""Errors of this package; each carries the exit code that a command line ends with."""


class ExportError(Exception):
    """The graph cannot be exported, or an exported graph breaks a rule of the canonical form."""

    exit_code = 2
