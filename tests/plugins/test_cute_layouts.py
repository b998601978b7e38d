"""The hardware's layouts as the kernels and their emulator have them, against NVIDIA's own description of them: CuTe.

The emulator was written from the same reading of the manuals as the kernels, so it cannot see a mistake of that reading.
CuTe's headers describe the same instructions and run on the host: matrix descriptors, swizzled tiles, the fragments of wgmma,
mma.sync, ldmatrix and stmatrix, tensor maps. Small integers, so every comparison is for equality.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from plugins.errors import ToolchainError
from plugins.toolchain import find_cutlass, find_nvcc

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TILE = 64 * 128  # bytes
IMAGE = 8 * TILE
Q, K, VALUES, LOW, SCORE, OUT = 0, 2 * TILE, 4 * TILE, 5 * TILE, 6 * TILE, 7 * TILE
K_ROWS, K_ROWS_64, K_DOWN, K_DOWN_128 = range(4)  # cute_operand's forms
OPERAND_SHAPES = {K_ROWS: (64, 128), K_ROWS_64: (64, 64), K_DOWN: (64, 64), K_DOWN_128: (128, 64)}
Array = npt.NDArray[np.generic]


def compile_once(name: str, command: list[str], sources: list[Path]) -> ctypes.CDLL:
    """Builds a shared library, once for the same command and sources."""
    content = b"".join(path.read_bytes() for path in sources) + "\0".join(command).encode()
    folder = Path(tempfile.gettempdir()) / f"mxcompile-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / "library.so"
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name} does not compile:\n{done.stderr[-4000:]}"
            partial.replace(target)
    return ctypes.CDLL(str(target))


def pointer(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def cute() -> ctypes.CDLL:
    """cute_tables.cpp, by nvcc's host compiler."""
    try:
        nvcc = find_nvcc()
    except ToolchainError as error:
        pytest.skip(str(error))
    headers = find_cutlass()
    if headers is None:
        pytest.skip("no CUTLASS headers found; `pip install mxcompile[plugins]`")
    source = HERE / "cute_tables.cpp"
    # The two macros are how CUTLASS knows the toolkit where nvcc only passes a source on to the host's compiler.
    command = [str(nvcc), "-x", "c++", "-std=c++17", "-O0", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-w"]
    command += [f"-I{headers}", "-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"]
    command += [f"-I{ROOT / 'plugins'}", f"-I{ROOT / 'plugins/include'}", str(source)]
    ours = [ROOT / "plugins/lightning" / name for name in ("row_map.h", "row_boxes.h", "lightning_attention.h")]
    return compile_once("cute", command, [source, *ours])


def compile_kernels(plugins: Path) -> ctypes.CDLL:
    """layout_harness.cpp over the sources in `plugins`."""
    emulator, source = HERE / "emulator", HERE / "layout_harness.cpp"
    command = [os.environ.get("CXX") or shutil.which("g++") or "g++", "-std=c++17", "-O1", "-shared", "-fPIC"]
    command += [f"-I{path}" for path in (plugins, plugins / "include", emulator)] + [str(source)]
    headers = [*(plugins / "lightning").glob("*.*h"), *(plugins / "include/mxc").glob("*"), *emulator.glob("*.h")]
    headers += (plugins / "moe").glob("*.*h")
    return compile_once("layout", command, [source, *sorted(headers)])


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return compile_kernels(ROOT / "plugins")


def operand(cute: ctypes.CDLL, form: int) -> tuple[Array, Array]:
    """Byte address of each element [M or N, K] of a tile at 0, and the descriptor of each 16 of K."""
    address, descriptor = np.zeros(OPERAND_SHAPES[form], np.uint32), np.zeros(8, np.uint64)
    cute.cute_operand(form, pointer(address), pointer(descriptor))
    return address, descriptor[: OPERAND_SHAPES[form][1] // 16]


def accumulator(cute: ctypes.CDLL, columns: int) -> Array:
    """[128, columns / 2]: which element of [64, columns] a thread's accumulator is."""
    element = np.zeros((128, columns // 2), np.int32)
    cute.cute_accumulator(columns, pointer(element))
    assert np.array_equal(np.sort(element.ravel()), np.arange(64 * columns))
    return element


def put(image: Array, at: int, address: Array, matrix: Array) -> None:
    image.view(np.uint16)[(at + address) // 2] = matrix.astype(ml_dtypes.bfloat16).view(np.uint16)


def get(image: Array, at: int, address: Array) -> Array:
    taken = np.ascontiguousarray(image.view(np.uint16)[(at + address) // 2])
    return taken.view(ml_dtypes.bfloat16).astype(np.float32)


def integers(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


class Run:
    """One step of the prefill (layout_harness.cpp) on an image of shared memory and accumulators [128, 64]."""

    def __init__(self, kernels: ctypes.CDLL, step: int, image: Array, accumulators: Array | None = None) -> None:
        given = np.zeros((128, 64), np.float32)
        if accumulators is not None:
            given[:, : accumulators.shape[1]] = accumulators
        self.image, self.out = np.zeros(IMAGE, np.uint8), np.zeros((128, 64), np.float32)
        self.products, self.registers_a = np.zeros((32, 6), np.uint64), np.zeros((32, 128, 4), np.uint32)
        arrays = (image, self.image, given, self.out, self.products, self.registers_a)
        code = kernels.run_step(step, *map(pointer, arrays))
        kernels.host_last_error.restype = ctypes.c_char_p
        assert code == 0, kernels.host_last_error().decode()

    def result(self, element: Array) -> Array:
        """The accumulators as the matrix [64, columns] that `element` spreads over them."""
        matrix = np.zeros(element.size, np.float32)
        matrix[element.ravel()] = self.out[:, : element.shape[1]].ravel()
        return matrix.reshape(64, -1)


def spread(matrix: Array, element: Array) -> Array:
    return np.ascontiguousarray(matrix.ravel()[element])


def check_scores(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    address, descriptors = operand(cute, K_ROWS)
    q, k, image = integers((64, 128), 1), integers((64, 128), 2), np.zeros(IMAGE, np.uint8)
    put(image, Q, address, q)
    put(image, K, address, k)
    run = Run(kernels, 0, image)
    along, down = transposition(cute)
    for step, descriptor in enumerate(descriptors.tolist()):
        expected = [descriptor + (Q >> 4), descriptor + (K >> 4), along, along, 64, step > 0]
        assert run.products[step].tolist() == expected
    assert not run.products[8:].any()
    assert down != along
    assert np.array_equal(run.result(accumulator(cute, 64)), q @ k.T)


def check_read_out(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    address, descriptors = operand(cute, K_ROWS)
    q, state, image = integers((64, 128), 3), integers((64, 128), 4), np.zeros(IMAGE, np.uint8)
    put(image, Q, address, q)
    run = Run(kernels, 1, image, spread(state, accumulator(cute, 128)))
    in_registers = np.zeros((128, 8), np.int32)
    cute.cute_register_a(pointer(in_registers))
    along, _ = transposition(cute)
    for step, descriptor in enumerate(descriptors.tolist()):
        assert run.products[step].tolist() == [0, descriptor + (Q >> 4), along, along, 64, step > 0]
        held = run.registers_a[step].view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(held, spread(np.ascontiguousarray(state[:, 16 * step : 16 * step + 16]), in_registers))
    assert np.array_equal(run.result(accumulator(cute, 64)), state @ q.T)


def check_values(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    (of_values, a), (of_scores, b) = operand(cute, K_DOWN), operand(cute, K_ROWS_64)
    values, scores, before = (integers((64, 64), seed) for seed in (5, 6, 7))  # [value, token], [i, j], [value, i]
    image = np.zeros(IMAGE, np.uint8)
    put(image, VALUES, of_values, values)
    put(image, SCORE, of_scores, scores)
    run = Run(kernels, 2, image, spread(before, accumulator(cute, 64)))
    along, down = transposition(cute)
    for step in range(4):
        product = run.products[step].tolist()
        assert without_leading(product[0]) == without_leading(int(a[step])) + (VALUES >> 4)
        assert product[1:] == [int(b[step]) + (SCORE >> 4), down, along, 64, True]
    assert np.array_equal(run.result(accumulator(cute, 64)), before + values @ scores.T)


def check_update(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    (of_values, a), (of_keys, b) = operand(cute, K_DOWN), operand(cute, K_DOWN_128)
    high, low, keys = integers((64, 64), 8), integers((64, 64), 9), integers((128, 64), 10)  # [value or key, token]
    image = np.zeros(IMAGE, np.uint8)
    put(image, VALUES, of_values, high)
    put(image, LOW, of_values, low)
    put(image, K, of_keys, keys)
    run = Run(kernels, 3, image)
    _, down = transposition(cute)
    for step in range(8):
        product = run.products[step].tolist()
        at = LOW if step < 4 else VALUES
        assert without_leading(product[0]) == without_leading(int(a[step % 4])) + (at >> 4)
        assert product[1:] == [int(b[step % 4]) + (K >> 4), down, down, 128, step > 0]
    assert np.array_equal(run.result(accumulator(cute, 128)), (high + low) @ keys.T)


def check_stored_tiles(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    """Scores [i, j] and outputs [token, value] as the products and the copy engine read them."""
    address, _ = operand(cute, K_ROWS_64)
    matrix, image = integers((64, 64), 11), np.zeros(IMAGE, np.uint8)
    run = Run(kernels, 4, image, spread(matrix, accumulator(cute, 64)))
    assert np.array_equal(get(run.image, SCORE, address), matrix)
    run = Run(kernels, 5, image, spread(matrix, accumulator(cute, 64)))
    assert np.array_equal(get(run.image, OUT, address), matrix.T)


CHECKS = (check_scores, check_read_out, check_values, check_update, check_stored_tiles)


def transposition(cute: ctypes.CDLL) -> tuple[int, int]:
    """The instruction's immediates for operands with K along the rows, and with K down the rows."""
    two = np.zeros(2, np.int32)
    cute.cute_transposed(pointer(two))
    return int(two[0]), int(two[1])


def without_leading(descriptor: int) -> int:
    """A tile of 64 columns is one swizzled row wide: the distance to the next 64 is not used, and CuTe leaves it 0."""
    return descriptor & ~(0x3FFF << 16)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_steps_of_the_prefill_use_cutes_layouts(check: object, cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    assert callable(check)
    check(cute, kernels)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("include/mxc/hopper.cuh", "kSwizzleAtomBytes = 1024", "kSwizzleAtomBytes = 2048"),
        ("include/mxc/hopper.cuh", "kLayout128 = 1", "kLayout128 = 2"),
        ("lightning/sm90_tiles.cuh", "kt % 4) * 32", "kt % 4) * 64"),
        ("lightning/sm90_tiles.cuh", "swizzledDescriptor(k, kBytes)", "swizzledDescriptor(k, 2 * kBytes)"),
        ("lightning/sm90_tiles.cuh", "warp * 2 + lane / 8 % 2", "warp * 2 + lane / 16"),
    ],
    ids=["stride", "swizzle", "along", "leading", "stored"],
)
def test_a_planted_mistake_is_seen(file: str, right: str, wrong: str, cute: ctypes.CDLL, tmp_path: Path) -> None:
    for folder in ("include", "lightning", "moe"):
        shutil.copytree(ROOT / "plugins" / folder, tmp_path / folder)
    source = tmp_path / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    mistaken = compile_kernels(tmp_path)
    found = 0
    for check in CHECKS:
        try:
            check(cute, mistaken)
        except AssertionError:
            found += 1
    assert found > 0


def bfloat16(matrix: Array) -> npt.NDArray[np.uint16]:
    return matrix.astype(ml_dtypes.bfloat16).view(np.uint16)


class Warp:
    """One instruction by 32 lanes: rows of 16 bytes in shared memory, 6 registers and 4 sums per lane."""

    def __init__(self, kernels: ctypes.CDLL, instruction: int, memory: Array, registers: Array, sums: Array) -> None:
        self.registers, self.sums = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.float32)
        self.memory = np.zeros(256, np.uint16)
        arrays = (memory, registers, sums, self.registers, self.sums, self.memory)
        code = kernels.run_warp(instruction, *map(pointer, arrays))
        assert code == 0


MEMORY = np.arange(1000, 1256, dtype=np.uint16)
REGISTERS = np.arange(1, 1 + 32 * 12, dtype=np.uint16).reshape(32, 12)  # two 16-bit elements each
NO_SUMS = np.zeros((32, 4), np.float32)


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_and_stmatrix_are_cutes(transposed: int, cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    element = np.zeros((32, 8), np.int32)
    cute.cute_load_matrix(transposed, pointer(element))
    loaded = Warp(kernels, transposed, MEMORY, REGISTERS.view(np.uint32), NO_SUMS)
    assert np.array_equal(loaded.registers.view(np.uint16), MEMORY[element])
    cute.cute_store_matrix(transposed, pointer(element))
    stored = Warp(kernels, 2 + transposed, MEMORY, REGISTERS.view(np.uint32), NO_SUMS)
    assert np.array_equal(stored.memory[element], REGISTERS[:, :8])


def test_movmatrix_is_stmatrix_and_a_transposed_ldmatrix(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    rows, columns = np.zeros((32, 8), np.int32), np.zeros((32, 8), np.int32)
    cute.cute_store_matrix(0, pointer(rows))
    cute.cute_load_matrix(1, pointer(columns))
    memory = np.zeros(64, np.uint16)
    memory[rows[:, :2]] = REGISTERS[:, :2]  # the first of four tiles is in each lane's first register
    moved = Warp(kernels, 4, MEMORY, REGISTERS.view(np.uint32), NO_SUMS)
    assert np.array_equal(moved.registers.view(np.uint16)[:, :2], memory[columns[:, :2]])


def test_mma_sync_fragments_are_cutes(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    a, b, c = integers((16, 16), 12), integers((8, 16), 13), integers((16, 8), 14)
    elements = [np.zeros((32, count), np.int32) for count in (8, 4, 4)]
    for index, element in enumerate(elements):
        cute.cute_mma(index, pointer(element))
    registers = np.zeros((32, 12), np.uint16)
    registers[:, :8] = bfloat16(spread(a, elements[0]))
    registers[:, 8:] = bfloat16(spread(b, elements[1]))
    done = Warp(kernels, 5, MEMORY, registers.view(np.uint32), spread(c, elements[2]))
    assert np.array_equal(done.sums, spread(c + a @ b.T, elements[2]))


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (37, 72)])
def test_the_experts_epilogue_finds_its_sums_where_cutlass_has_them(
    rows: int, columns: int, cute: ctypes.CDLL, kernels: ctypes.CDLL
) -> None:
    at = np.zeros((256, 128, 2), np.int32)
    cute.cute_expert_tile(pointer(at))
    assert len({tuple(place) for place in at.reshape(-1, 2).tolist()}) == 128 * 256
    tile = np.random.default_rng(16).standard_normal((128, 256)).astype(np.float32)
    sums, first = np.ascontiguousarray(tile[at[..., 0], at[..., 1]]), np.ascontiguousarray(at[:, 0])
    out = np.zeros((rows, columns), np.uint16)
    assert kernels.run_gated(pointer(sums), pointer(first), pointer(out), rows, columns) == 0
    gate, up = tile[:rows, : 2 * columns : 2].astype(np.float64), tile[:rows, 1 : 2 * columns : 2].astype(np.float64)
    found = out.view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, rtol=2**-8, atol=1e-30)


def test_a_copied_box_lies_as_the_products_read_it(cute: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    address, _ = operand(cute, K_ROWS_64)
    rows, image = integers((64, 64), 15), np.zeros(TILE, np.uint8)
    assert kernels.run_box(pointer(bfloat16(rows)), pointer(image)) == 0
    assert np.array_equal(get(image, 0, address), rows)


class MapArguments(ctypes.Structure):
    """What cuTensorMapEncodeTiled is given."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("type", "rank", "interleave", "swizzle", "fill")),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64 * 5),
        ("stride", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("step", ctypes.c_uint32 * 5),
    ]

    def dimensions(self) -> list[tuple[int, int, int, int]]:
        """(stride in bytes, size, box, step) of each dimension, the nearest elements first."""
        strides = [2, *self.stride]
        return sorted((strides[i], self.size[i], self.box[i], self.step[i]) for i in range(self.rank))


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 8192, 64), (3, 1000, 8), (2, 1, 3)])
@pytest.mark.parametrize("ctas", [1, 2])
def test_tensor_maps_are_cutes(batch: int, tokens: int, heads: int, ctas: int, cute: ctypes.CDLL) -> None:
    cute.map_bytes.restype = ctypes.c_size_t
    assert cute.map_bytes() == ctypes.sizeof(MapArguments)
    theirs, ours = MapArguments(), MapArguments()
    rows = ctypes.c_void_p(1 << 30)
    cute.cute_map(batch, tokens, heads, ctas, rows, ctypes.byref(theirs))
    cute.our_map(batch, tokens, heads, 64 // ctas, rows, ctypes.byref(ours))
    for name in ("type", "rank", "interleave", "swizzle", "fill", "address"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.dimensions() == theirs.dimensions()
    # As prefill_sm90.cuh names them: column, head, token, sequence.
    assert list(ours.size)[:4] == [128, heads, tokens, batch]
    assert list(ours.box)[:4] == [64, 1, 64 // ctas, 1]
    assert all(stride % 16 == 0 and 0 < stride < 1 << 40 for stride in list(ours.stride)[:3])
