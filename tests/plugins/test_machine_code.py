"""The kernels' machine code, disassembled: what the predictions in benchmarks/gpu/*_versions.md rest on.

Checked on the library that the tests build, for one portable architecture and for sm_90a; where they do not build it for that, on the one
in build/gpu, if it is of these sources (docs/gpu-runs.md). Needs cuobjdump and nvdisasm. A count that changes is no fault by itself:
count again, then change the table and the prediction together.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from plugins.build import BuildResult, load_result, sources_digest

ROOT = Path(__file__).resolve().parents[2]
HOPPER = ROOT / "build" / "gpu"


@dataclass(frozen=True)
class Instruction:
    """`op` with its modifiers, without its predicate: LDG.E.128."""

    address: int
    op: str
    operands: str

    @property
    def kind(self) -> str:
        return self.op.split(".")[0]

    @property
    def wide(self) -> bool:
        """Whether a load or store moves 16 bytes a thread."""
        return ".128" in self.op


class Kernel:
    """One kernel's instructions, and its loops."""

    def __init__(self, name: str, instructions: list[Instruction]) -> None:
        self.name, self.instructions = name, instructions
        self.counts = Counter(one.kind for one in instructions)

    def count(self, start: str) -> int:
        return sum(one.op.startswith(start) for one in self.instructions)

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """Bodies of all loops: from a jump's earlier target to the jump."""
        bodies = []
        for last, one in enumerate(self.instructions):
            target = re.search(r"0x([0-9a-f]+)", one.operands) if one.kind == "BRA" else None
            if target is not None and int(target[1], 16) < one.address:
                first = bisect_left(self.instructions, int(target[1], 16), key=lambda other: other.address)
                bodies.append(self.instructions[first : last + 1])
        return bodies

    def loops_with(self, kind: str) -> list[Counter[str]]:
        """What the smallest loops with such an instruction hold; accesses of 16 bytes as LDG.128, STG.128 and so on."""
        found: list[tuple[int, int, Counter[str]]] = []
        for body in sorted(self.loops, key=len):
            start, end = body[0].address, body[-1].address
            if any(start <= s and e <= end for s, e, _ in found):
                continue
            held = Counter(one.kind + (".128" if one.wide and one.kind in _ACCESSES else "") for one in body)
            if held[kind]:
                found.append((start, end, held))
        return [held for _, _, held in found]


_ACCESSES = ("LDG", "STG", "LDGSTS")


def find_tools() -> dict[str, str]:
    """Paths of cuobjdump and nvdisasm: from PATH, beside nvcc, or from NVIDIA's or Triton's Python packages."""
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.append(str(Path(nvcc).resolve().parent))
    for package, pattern in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec is not None else ():
            folders += [str(path) for path in Path(root).glob(pattern)]
    search = os.pathsep.join(folders)
    found = {tool: shutil.which(tool, path=search) for tool in ("cuobjdump", "nvdisasm")}
    return {tool: path for tool, path in found.items() if path is not None}


def disassemble(library: Path, architecture: str) -> dict[str, Kernel]:
    """All kernels of a library for one architecture, such as 90a, by their mangled names."""
    tools = find_tools()
    if len(tools) < 2:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = os.pathsep.join([str(Path(tools["nvdisasm"]).parent), os.environ.get("PATH", "")])
    command = [tools["cuobjdump"], "--dump-sass", "--gpu-architecture", f"sm_{architecture}", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return {kernel.name: kernel for kernel in read(done.stdout)}


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;")


def read(text: str) -> Iterator[Kernel]:
    """Kernels in what `cuobjdump --dump-sass` prints."""
    name, instructions = "", []
    for line in text.splitlines():
        if (start := line.find("Function : ")) >= 0:
            if name:
                yield Kernel(name, instructions)
            name, instructions = line[start + len("Function : ") :].strip(), []
        elif match := _LINE.match(line):
            instructions.append(Instruction(int(match[1], 16), match[2], match[3] or ""))
    if name:
        yield Kernel(name, instructions)


@pytest.fixture(scope="module")
def portable(plugin_build: BuildResult) -> dict[str, Kernel]:
    for architecture in ("80", "86", "89"):  # sm_120 spells some of these instructions in another way
        if architecture in plugin_build.architectures:
            return disassemble(plugin_build.kernels.path, architecture)
    pytest.skip("the library was built for none of sm_80, 86 and 89; MXCOMPILE_TEST_ARCHS=80 builds it for one")


@pytest.fixture(scope="module")
def hopper(plugin_build: BuildResult) -> dict[str, Kernel]:
    if "90a" in plugin_build.architectures:
        return disassemble(plugin_build.kernels.path, "90a")
    built = load_result(HOPPER)
    if built is None or "90a" not in built.architectures or built.sources != sources_digest(built.architectures):
        pytest.skip("no library of these sources for sm_90a in build/gpu; docs/gpu-runs.md says how to build it")
    return disassemble(HOPPER / "libmxcompile_kernels.so", "90a")


@pytest.fixture(params=["portable", "hopper"])
def kernels(request: pytest.FixtureRequest) -> dict[str, Kernel]:
    found: dict[str, Kernel] = request.getfixturevalue(request.param)
    return found


def named(kernels: dict[str, Kernel], *parts: str) -> list[Kernel]:
    """Kernels whose names have all these parts; at least one."""
    found = [kernel for name, kernel in kernels.items() if all(part in name for part in parts)]
    assert found, f"no kernel with {parts}"
    return found


def test_what_cuobjdump_prints_is_read() -> None:
    text = """
\t\tFunction : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ; /* 0x0 */
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/               @P1 BRA 0x10 ;
        /*0040*/                   EXIT ;
\t\tFunction : second
        /*0000*/                   EXIT ;
"""
    first, second = read(text)
    assert [one.op for one in first.instructions] == ["MOV", "LDG.E.128", "WARPGROUP.ARRIVE", "BRA", "EXIT"]
    assert [[one.kind for one in loop] for loop in first.loops] == [["LDG", "WARPGROUP", "BRA"]]
    assert first.loops_with("LDG.128") == [Counter({"LDG.128": 1, "WARPGROUP": 1, "BRA": 1})]
    assert (second.name, second.counts) == ("second", Counter({"EXIT": 1}))


def test_nothing_lies_in_local_memory(kernels: dict[str, Kernel]) -> None:
    assert len(kernels) > 60
    for kernel in kernels.values():
        assert kernel.instructions
        assert not kernel.counts["LDL"] + kernel.counts["STL"], kernel.name


def test_decode_reads_and_writes_states_16_bytes_at_a_time(kernels: dict[str, Kernel]) -> None:
    """The loop over a state: 16 loads and as many stores, none narrower."""
    for kernel in named(kernels, "6DecodeI"):
        (body,) = [body for body in kernel.loops_with("STG.128") if body["LDG.128"] > 1]
        assert (body["LDG.128"], body["STG.128"], body["LDG"], body["STG"]) == (16, 16, 0, 0), kernel.name


def test_streaming_experts_load_weights_16_bytes_at_a_time_into_products(kernels: dict[str, Kernel]) -> None:
    """The loops over columns have loads of the next columns among their products, none narrower, and no barrier."""
    for kernel in named(kernels, "9MoeStreamI"):
        bodies = kernel.loops_with("HMMA")
        assert bodies, kernel.name
        for body in bodies:
            assert body["LDG.128"] >= 4, kernel.name
            assert body["LDG"] == body["BAR"] == 0, kernel.name


@pytest.mark.parametrize(("kernel_name", "products"), [("Li128E", 64), ("Li64E", 32)])
def test_grouped_experts_copy_asynchronously_and_multiply(
    kernels: dict[str, Kernel], kernel_name: str, products: int
) -> None:
    for kernel in named(kernels, "10MoeGroupedI", kernel_name):
        (body,) = kernel.loops_with("HMMA")
        assert body["HMMA"] == products, kernel.name
        assert body["LDGSTS.128"] >= 4, kernel.name
        assert body["LDSM"], kernel.name
        assert body["LDGSTS"] == body["STG"] == 0, kernel.name


def test_portable_prefill_and_attention_use_tensor_cores_from_shared_memory(kernels: dict[str, Kernel]) -> None:
    for kernel in [*named(kernels, "15PrefillPortableI"), *named(kernels, "13AttentionTileI")]:
        assert kernel.counts["LDSM"], kernel.name
        assert kernel.counts["HMMA"] >= 16, kernel.name
        assert sum(one.kind == "LDGSTS" and one.wide for one in kernel.instructions) >= 8, kernel.name


def form(kernel: Kernel) -> int:
    """0: clusters, 1: apart, 2: summaries; the last template argument."""
    match = re.search(r"Sm90FormE(\d)", kernel.name)
    assert match is not None, kernel.name
    return int(match[1])


def test_hopper_loops_around_products_and_states_call_nothing(hopper: dict[str, Kernel]) -> None:
    """Slow paths of divisions are functions; they belong outside. (For sm_80 the compiler also writes jumps as calls.)"""
    for kernel in hopper.values():
        if any(name in kernel.name for name in ("6DecodeI", "9MoeStreamI", "10MoeGroupedI", "11PrefillSm90I")):
            for kind in ("STG.128", "HMMA", "HGMMA", "UTMALDG"):
                assert not any(body["CALL"] for body in kernel.loops_with(kind)), (kernel.name, kind)


def test_hopper_prefill_holds_the_counted_products_and_copies(hopper: dict[str, Kernel]) -> None:
    """Products of 64x64x16 and 64x128x16, copies in (5 with value halves, else 6; 4 for summaries) and out: the counts of
    benchmarks/gpu/lightning_versions.md.
    """
    found = named(hopper, "11PrefillSm90I")
    assert {form(kernel) for kernel in found} == {0, 1, 2}
    for kernel in found:
        summary = form(kernel) == 2
        assert kernel.counts["HMMA"] == 0, kernel.name
        assert kernel.counts["USETMAXREG"] == 3, kernel.name
        assert (kernel.count("HGMMA.64x64x16"), kernel.count("HGMMA.64x128x16")) == ((0, 8) if summary else (20, 8))
        halves = "Li2E" in kernel.name
        assert kernel.counts["UTMALDG"] == (4 if summary else 5 if halves else 6), kernel.name
        assert kernel.counts["UTMASTG"] == (0 if summary else 1), kernel.name
        inside = sorted(body["HGMMA"] for body in kernel.loops_with("HGMMA"))
        assert inside == ([8] if summary else [8, 20]), kernel.name


def test_hopper_experts_are_products_of_64x256(hopper: dict[str, Kernel]) -> None:
    for kernel in named(hopper, "multiplyFc"):
        assert kernel.count("HGMMA.64x256x16") == kernel.counts["HGMMA"] == 8, kernel.name
        assert kernel.counts["UTMALDG"] == 2, kernel.name
        assert kernel.counts["USETMAXREG"] == 2, kernel.name
        assert kernel.counts["HMMA"] == 0, kernel.name
