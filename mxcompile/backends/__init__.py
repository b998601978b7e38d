"""Sessions of other runtimes on the checkpoint itself, behind the interface that engines have, to compare engines with."""
