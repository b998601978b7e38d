"""Errors of this package; each carries the exit code that a command line ends with."""


class ModelDefsError(Exception):
    """Base class. `exit_code` 2: what the user gave is wrong; 3: the machine (disk, memory, a missing library) is."""

    exit_code = 2


class ConfigError(ModelDefsError):
    """A model configuration that cannot be read or is not of this family; names the key."""


class CheckpointError(ModelDefsError):
    """A checkpoint that is missing, damaged or of another shape; names the file and the tensor."""


class StorageError(ModelDefsError):
    """A disk that is full or cannot be written."""

    exit_code = 3
