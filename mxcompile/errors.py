"""Errors of this package; each carries the exit code that the command line ends with."""


class MxcompileError(Exception):
    """What the user gave is wrong: the message says what and what to do."""

    exit_code = 2


class EnvironmentProblem(MxcompileError):
    """The machine lacks something: a library, a GPU, room on the disk."""

    exit_code = 3
