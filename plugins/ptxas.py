"""What ptxas says about each kernel: registers, shared memory, spills, serialised wgmma, ignored setmaxnreg.

Run as a program it stands before nvcc (`python ptxas.py nvcc ... -o x.o`): it runs the command, fails where a kernel spills,
wgmma is serialised or setmaxnreg ignored, and leaves what it read in `x.o.ptxas.json`. Standard library only: CMake runs it with
any Python.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class KernelUsage:
    """Resources of one kernel on one architecture. `name` is the mangled symbol; sizes are bytes, static ones."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
# C7508: "Potential Performance Loss: 'setmaxnreg' ignored ..."; C7510: "... wgmma.mma_async instructions are serialized ..."
_LOSS = re.compile(r"\bC75\d\d\b|Potential Performance Loss|wgmma\.mma_async instructions are serialized")


def parse(text: str) -> list[KernelUsage]:
    """Kernels in the output of `nvcc -Xptxas -v`, in its order."""
    kernels: list[KernelUsage] = []
    name = architecture = described = ""
    stack = spill = 0
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            name, architecture, stack, spill, described = match[1], match[2], 0, 0, match[1]
        elif match := _PROPERTIES.search(line):
            described = match[1]  # device functions that are not inlined have properties of their own
        elif match := _FRAME.search(line):
            spill += int(match[2]) + int(match[3])
            if described == name:
                stack = int(match[1])
        elif name and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(
                KernelUsage(name, architecture, int(match[1]), int(shared[1]) if shared else 0, stack, spill)
            )
            name = ""
    return kernels


def faults(text: str) -> list[str]:
    """One sentence for each thing in ptxas' output that the build must not let pass."""
    found = [
        f"kernel {kernel.name} spills {kernel.spill_bytes} bytes of registers on sm_{kernel.architecture}"
        for kernel in parse(text)
        if kernel.spill_bytes
    ]
    found += [f"a kernel is slower than written: {line.strip()}" for line in text.splitlines() if _LOSS.search(line)]
    return found


def main(command: Sequence[str]) -> int:
    """Runs the compiler `command`; its exit code, or 1 where `faults` finds something."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stdout.write(done.stdout)
    if done.returncode or "-o" not in command:
        return done.returncode
    wrong = faults(done.stdout)
    for fault in wrong:
        print(f"error: {fault}")
    output = Path(command[list(command).index("-o") + 1])
    if wrong:
        output.unlink(missing_ok=True)  # else the next build would take the object for good
        return 1
    usage = [asdict(kernel) for kernel in parse(done.stdout)]
    output.with_name(output.name + ".ptxas.json").write_text(json.dumps(usage))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
