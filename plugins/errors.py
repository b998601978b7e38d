"""Errors of this package; each carries the exit code that a command line ends with."""


class PluginsError(Exception):
    """Base class. `exit_code` 2: what the user gave is wrong; 3: the machine (a missing tool, library or GPU) is."""

    exit_code = 3


class PluginsUsageError(PluginsError):
    """An argument that cannot be right: an unknown architecture, a tensor of the wrong shape."""

    exit_code = 2


class ToolchainError(PluginsError):
    """A compiler or headers that are missing; says where they were looked for and what to install."""


class BuildError(PluginsError):
    """The compiler refused the sources, a kernel spills registers, or ptxas serialised wgmma; `log` has the whole output."""

    exit_code = 1

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class LibraryError(PluginsError):
    """The built library is missing, does not load, or is of another version than this package."""


class KernelError(PluginsError):
    """A launcher refused its arguments or a launch failed; `status` is the C interface's code (mxc/types.h)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        self.exit_code = 2 if status in (1, 2) else 3
