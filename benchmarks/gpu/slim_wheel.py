"""A copy of an onnxruntime-gpu wheel with machine code for one architecture only, for machines that files reach in small loads.

    python benchmarks/gpu/slim_wheel.py onnxruntime_gpu-*.whl FOLDER --arch 90

In the CUDA provider's fat binaries the code of other architectures becomes zeros, which take no room in the wheel: the driver picks the
code of the GPU at hand and reads no other. The TensorRT provider is left out. For a benchmark on a machine of one's own; the copy runs
on GPUs of that architecture alone.
"""

from __future__ import annotations

import argparse
import struct
import sys
import zipfile
from pathlib import Path

CUDA_PROVIDER, TENSORRT_PROVIDER = "libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so"
# A fat binary: magic number, version, bytes of this header, bytes that follow. Each entry: kind (2 is machine code), version, bytes of its
# header, bytes of its content, and at byte 28 the architecture.
_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER, _ENTRY, _ARCHITECTURE = "<HHQ", "<HHIQ", 28
_MACHINE_CODE = 2


def keep_architecture(data: bytearray, arch: int) -> tuple[int, int]:
    """Clear what is not machine code for `arch` in all fat binaries of `data`, in place; (bytes kept, bytes cleared)."""
    kept = cleared = position = 0
    while (start := data.find(_MAGIC, position)) >= 0:
        version, header, size = struct.unpack_from(_HEADER, data, start + 4)
        position = start + 4
        if (version, header) != (1, 16) or start + header + size > len(data):
            continue  # the same four bytes somewhere else
        entry, end = start + header, start + header + size
        while entry + 64 <= end:
            kind, _, own, content = struct.unpack_from(_ENTRY, data, entry)
            if not 64 <= own <= 512 or entry + own + content > end:
                break
            (found,) = struct.unpack_from("<I", data, entry + _ARCHITECTURE)
            if (kind, found) == (_MACHINE_CODE, arch):
                kept += content
            else:
                cleared += content
                data[entry + own : entry + own + content] = bytes(content)
            entry += own + content
        position = end
    return kept, cleared


def slim(wheel: Path, folder: Path, arch: int) -> Path:
    """Write the copy, under the same name, into `folder`. ValueError where the wheel holds no code for `arch`."""
    target = folder / wheel.name
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(wheel):
        raise ValueError(f"{folder} is where the wheel lies; name another folder")
    kept = 0
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as copy:
        for item in source.infolist():
            name = item.filename.rsplit("/", 1)[-1]
            if name == TENSORRT_PROVIDER:
                continue
            content = bytearray(source.read(item))
            if name == CUDA_PROVIDER:
                kept, cleared = keep_architecture(content, arch)
                print(f"{name}: {kept / 1e6:.1f} MB of code for sm_{arch} kept, {cleared / 1e6:.1f} MB cleared")
            copy.writestr(item, bytes(content), zipfile.ZIP_DEFLATED)
    if not kept:
        target.unlink()
        raise ValueError(f"{wheel.name} has no machine code for sm_{arch}")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (%(default)s)")
    options = parser.parse_args()
    try:
        target = slim(options.wheel, options.folder, options.arch)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB instead of {options.wheel.stat().st_size / 1e6:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
