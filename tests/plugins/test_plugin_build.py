"""The build: what it refuses, what it skips, and what it reads from ptxas."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plugins import build as build_module
from plugins import catalog, ptxas, toolchain
from plugins.build import BuildResult, build, check_architectures, load_result, main, source_digest
from plugins.errors import BuildError, PluginsUsageError, ToolchainError

PTXAS_OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 17.273 ms
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90a'
ptxas info    : Function properties for _Z6secondPf
    880 bytes stack frame, 1168 bytes spill stores, 1192 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers, 880 bytes cumulative stack size, 364 bytes cmem[0]
"""
SERIALISED = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to function call"
IGNORED = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements."

SPILLING_KERNEL = """\
__global__ void __launch_bounds__(1024, 2) spilling(float* p, int n) {
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = p[i * n + threadIdx.x];
    for (int r = 0; r < n; ++r) {
#pragma unroll
        for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 7) & 63] + p[r];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) p[i * n + threadIdx.x] = a[i];
}
void start(float* p) { spilling<<<1, 1024>>>(p, 3); }
"""


def test_ptxas_output_is_read_kernel_by_kernel() -> None:
    first, second = ptxas.parse(PTXAS_OUTPUT)
    assert first == ptxas.KernelUsage("_Z5firstPf", "80", 32, 4096, 0, 0)
    assert second == ptxas.KernelUsage("_Z6secondPf", "90a", 168, 0, 880, 2360)


def test_spills_serialised_wgmma_and_ignored_setmaxnreg_are_faults() -> None:
    faults = ptxas.faults(f"{PTXAS_OUTPUT}{SERIALISED}\n{IGNORED}\n")
    assert len(faults) == 3
    assert "_Z6secondPf" in faults[0]
    assert "2360 bytes" in faults[0]
    assert "serialized" in faults[1]
    assert "setmaxnreg" in faults[2]
    assert ptxas.faults("".join(PTXAS_OUTPUT.splitlines(keepends=True)[:6])) == []


@pytest.mark.parametrize(("text", "code"), [(PTXAS_OUTPUT, 1), (PTXAS_OUTPUT.split("'_Z6")[0], 0), (SERIALISED, 1)])
def test_launcher_keeps_only_objects_without_faults(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "text").write_text(text)
    script = f"import sys, pathlib; pathlib.Path(sys.argv[2]).touch(); print(open({str(tmp_path / 'text')!r}).read())"
    target = tmp_path / "x.o"
    command = [sys.executable, ptxas.__file__, sys.executable, "-c", script, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert target.exists() == (code == 0)
    assert (tmp_path / "x.o.ptxas.json").exists() == (code == 0)


def test_launcher_passes_a_compiler_failure_on(tmp_path: Path) -> None:
    command = [sys.executable, ptxas.__file__, sys.executable, "-c", "raise SystemExit(7)", "-o", str(tmp_path / "x.o")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 7


@pytest.mark.parametrize("archs", [["75"], ["90"], ["90a", "hopper"], [""], []])
def test_unknown_architectures_are_refused(archs: list[str]) -> None:
    with pytest.raises(PluginsUsageError, match="choose from 80, 86, 89, 90a, 120") as raised:
        check_architectures(archs)
    assert raised.value.exit_code == 2


def test_architectures_are_put_in_order_once() -> None:
    assert check_architectures(["120", "80", "120"]) == ("80", "120")


def test_command_line_ends_with_the_exit_code_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "12"]) == 2
    assert main(["--arch", "80", "--jobs", "0"]) == 2
    assert "error: unknown architecture 12" in capsys.readouterr().err


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.os, "access", lambda path, mode: False)
    with pytest.raises(ToolchainError, match="no nvcc found") as raised:
        toolchain.find_nvcc()
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(("says", "wrong"), [("release 11.8, V11.8.89", "11.8"), ("something else", "nothing known")])
def test_unusable_compiler_is_refused(tmp_path: Path, says: str, wrong: str) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
    nvcc.chmod(0o755)
    with pytest.raises(ToolchainError, match=wrong):
        toolchain.nvcc_version(nvcc)


def test_tensorrt_header_folder_must_hold_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(ToolchainError, match="NvInferVersion"):
        toolchain.find_tensorrt_headers()
    (tmp_path / "NvInferVersion.h").write_text(
        "#define TRT_MAJOR_X 11\n#define NV_TENSORRT_MAJOR TRT_MAJOR_X\n#define NV_TENSORRT_MINOR 4\n"
    )
    assert toolchain.find_tensorrt_headers() == (tmp_path, "11.4")


def test_unchanged_tree_is_not_built_again(plugin_build: BuildResult) -> None:
    again = build(plugin_build.architectures, plugin_build.kernels.path.parent)
    assert again.skipped
    assert again.digest == plugin_build.digest
    assert again.usage == plugin_build.usage


def test_truncated_library_is_not_taken_for_built(plugin_build: BuildResult, tmp_path: Path) -> None:
    folder = plugin_build.kernels.path.parent
    for name in [library.path.name for library in plugin_build.libraries] + [build_module.MANIFEST]:
        shutil.copy(folder / name, tmp_path / name)
    assert load_result(tmp_path) is not None
    (tmp_path / build_module.KERNELS_LIBRARY).write_bytes(b"")
    assert load_result(tmp_path) is None
    (tmp_path / build_module.MANIFEST).write_text("{")
    assert load_result(tmp_path) is None


def test_digest_follows_sources_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = toolchain.Toolchain(Path("nvcc"), "13.0.88", Path("cmake"), None, Path("include"), "10.14", None)
    monkeypatch.setattr(build_module, "SOURCE_DIR", tmp_path)
    (tmp_path / "a.cu").write_text("x")
    (tmp_path / "ignored.txt").write_text("x")
    digests = {source_digest(tools, ["80"], True), source_digest(tools, ["80"], True)}
    assert len(digests) == 1
    digests.add(source_digest(tools, ["80", "90a"], True))
    digests.add(source_digest(tools, ["80"], False))
    digests.add(source_digest(dataclasses.replace(tools, nvcc_version="13.5.37"), ["80"], True))
    (tmp_path / "a.cu").write_text("y")
    digests.add(source_digest(tools, ["80"], True))
    (tmp_path / "a.cu").rename(tmp_path / "b.cu")
    digests.add(source_digest(tools, ["80"], True))
    assert len(digests) == 6
    (tmp_path / "ignored.txt").write_text("y")
    assert source_digest(tools, ["80"], True) in digests


@pytest.mark.parametrize(
    ("name", "code", "wrong"),
    [
        ("spill.cu", SPILLING_KERNEL, "spill"),
        ("broken.cpp", "int main( {", "error"),
        ("unused.cpp", "void f() { int x = 1; }", "unused"),
    ],
)
def test_bad_source_fails_the_build_with_its_reason(
    plugin_build: BuildResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, code: str, wrong: str
) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    (source / "src").mkdir(parents=True)
    for needed in ("CMakeLists.txt", "ptxas.py"):
        shutil.copy(build_module.SOURCE_DIR / needed, source)
    (source / "src" / name).write_text(code)
    monkeypatch.setattr(build_module, "SOURCE_DIR", source)
    with pytest.raises(BuildError, match=wrong) as raised:
        build(["80"], folder, tensorrt=False)
    assert raised.value.exit_code == 1
    assert not (folder / build_module.MANIFEST).exists()


def test_no_kernel_spills_and_all_are_reported(plugin_build: BuildResult) -> None:
    assert {kernel.architecture for kernel in plugin_build.usage} == set(plugin_build.architectures)
    assert all(kernel.spill_bytes == 0 and 0 < kernel.registers <= 255 for kernel in plugin_build.usage)
    assert any("ightning" in kernel.name or "Prefill" in kernel.name for kernel in plugin_build.usage)
    assert any("oe" in kernel.name.lower() for kernel in plugin_build.usage)


def test_warpgroups_can_trade_their_registers(plugin_build: BuildResult) -> None:
    """setmaxnreg hands out what the CTA began with: 65,536 registers over its threads. With fewer it would wait for ever."""
    for kernel in plugin_build.usage:
        if kernel.architecture != "90a" or not ("PrefillSm90" in kernel.name or "multiplyFc" in kernel.name):
            continue  # code for other architectures has no warpgroups
        threads = 512 if "BFloat16ELi1E" in kernel.name or "HalfELi1E" in kernel.name else 384
        assert kernel.registers == 65536 // threads // 8 * 8, kernel.name


def test_manifest_is_plain_data(plugin_build: BuildResult) -> None:
    data = json.loads((plugin_build.kernels.path.parent / build_module.MANIFEST).read_text())
    assert data["architectures"] == list(plugin_build.architectures)
    assert set(data["libraries"]) == {library.path.name for library in plugin_build.libraries}


def test_catalog_is_consistent() -> None:
    assert set(catalog.GPU_NAMES) == set(catalog.ARCHITECTURES)
    for op in catalog.OPS:
        assert catalog.find(op.plugin) is op
        assert all(catalog.find(alias) is op for alias in op.aliases)
        assert set(op.architectures) <= set(catalog.ARCHITECTURES)
    assert catalog.find("Conv") is None


@pytest.mark.parametrize(
    ("capability", "arch"), [(80, "80"), (87, "86"), (89, "89"), (90, "90a"), (100, None), (121, "120"), (75, None)]
)
def test_architecture_of_a_gpu(capability: int, arch: str | None) -> None:
    assert catalog.architecture_for(capability) == arch
