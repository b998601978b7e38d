"""Compiling guides of strangers out of harm's way.

A grammar of a few kilobytes can take the library minutes, gigabytes, or the whole stack, which ends the process. So each
guide is first compiled in a child process with bounded time, memory and stack: `python -m mxcompile.guides.trial FD`.
What passes there passes in this process, too, where the compiler has more of everything. (Only compiling goes deep: the steps of
an answer need no more stack for a deep grammar than for a flat one.)

Messages in, over an inherited socket, as JSON: first the vocabulary, {"size", "special": [[id, text], ...]}; then guides,
{"kind", "text"}. Messages out, one for each guide: {"grammar"} in the library's form, or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from mxcompile.child import Child, limit
from mxcompile.guides.guide import Guide, GuideError

SECONDS = 2  # of processor time for one guide; a large schema takes a tenth
_MOST_MEMORY = 2 << 30  # bytes of address space
STACK = 16 << 20  # bytes; enough for some thousand definitions inside each other
_HANG_S = 300.0  # only a stopped process takes that long


class Trial:
    """The child process, which is started for the first guide, and again after it ended. Use it from one thread at a time."""

    def __init__(self, size: int, special: Sequence[tuple[int, str]]) -> None:
        """`size` of the vocabulary; `special` tokens in it, which grammars may name."""
        self._child = Child("mxcompile.guides.trial", json.dumps({"size": size, "special": special}).encode())

    def compile(self, guide: Guide) -> str:
        """The guide in the library's form. Raises GuideError with the reason when it cannot be followed."""
        connection, process = self._child.started()
        try:
            connection.send_bytes(json.dumps({"kind": guide.kind, "text": guide.text}).encode())
            answer = json.loads(connection.recv_bytes()) if connection.poll(_HANG_S) else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            slow = process.returncode in (None, -signal.SIGXCPU)
            self.close()
            why = (
                f"takes longer than {SECONDS} s to compile" if slow else "is too large or too deeply nested to compile"
            )
            raise GuideError(f"{guide.kind}: it {why}; make it simpler")
        if "error" in answer:
            raise GuideError(answer["error"])
        return str(answer["grammar"])

    def close(self) -> None:
        """End the child process."""
        self._child.close()


def main() -> int:
    """Serve the process at the other end until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal is for others to answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit(resource.RLIMIT_AS, _MOST_MEMORY)
    connection = Connection(int(sys.argv[1]))
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve, args=(connection,))
    thread.start()
    thread.join()
    return 0


def _serve(connection: Connection) -> None:
    from mxcompile.guides.library import make_tokenizer, shortened

    with contextlib.suppress(EOFError, OSError):  # the other process is gone
        vocabulary = json.loads(connection.recv_bytes())
        special = {int(token): text.encode() for token, text in vocabulary["special"]}
        size = max(vocabulary["size"], 256 + len(special))
        # Single bytes do for a trial; numbers in grammars mean the same tokens here if they are special.
        plain = [token for token in range(size) if token not in special][:256]
        tokens = [special.get(token, b"") for token in range(size)] + [b"<end>"]
        for byte, token in enumerate(plain):
            tokens[token] = bytes([byte])
        tokenizer = make_tokenizer(tokens, list(special), lambda data: [plain[byte] for byte in data])
        while True:
            asked = json.loads(connection.recv_bytes())
            limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + SECONDS)
            try:
                answer = {"grammar": _tried(tokenizer, Guide(asked["kind"], asked["text"]))}
            except GuideError as error:
                answer = {"error": str(error)}
            except Exception as error:  # of the library
                answer = {"error": f"{asked['kind']}: {shortened(str(error))}"}
            connection.send_bytes(json.dumps(answer).encode())


def _tried(tokenizer: object, guide: Guide) -> str:
    from mxcompile.guides.library import grammar_of, make_matcher, shortened

    grammar = grammar_of(guide)
    matcher = make_matcher(tokenizer, grammar, guide.kind)  # type: ignore[arg-type]
    matcher.compute_bitmask()  # an answer that cannot begin must not be let in
    if matcher.is_error():
        reason = shortened(matcher.get_error())
        raise GuideError(f"{guide.kind}: no answer can begin under it ({reason})")
    return grammar


if __name__ == "__main__":
    sys.exit(main())
