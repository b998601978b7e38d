"""`mxcompile plugins build` and `mxcompile plugins list`."""

from __future__ import annotations

from pathlib import Path

import click

from mxcompile.cli.options import PATH, Verb, json_option, verbose_option


@click.group()
def command() -> None:
    """Build or list the CUDA kernels and the TensorRT plugin library."""


@command.command(cls=Verb)
@click.option(
    "--arch", "archs", multiple=True, metavar="SM", help="GPU architecture, such as 90a; repeatable.  [default: all]"
)
@click.option("-o", "--output", type=PATH, metavar="DIR", help="Folder of the libraries.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Compilers at a time.  [default: all cores]")
@click.option("--tensorrt/--no-tensorrt", default=None, help="Insist on the TensorRT library, or leave it out.")
@click.option("--force", is_flag=True, help="Build even if nothing has changed.")
@json_option
@verbose_option
def build(
    archs: tuple[str, ...],
    output: Path | None,
    jobs: int | None,
    tensorrt: bool | None,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Compile the kernel library and, where TensorRT headers are, the TensorRT plugin library. Needs nvcc, no GPU."""
    from mxcompile.cli.output import bytes_text, print_json, print_pairs
    from mxcompile.cli.progress_bars import progress
    from plugins import catalog
    from plugins.build import build as build_libraries

    with progress(verbose) as shown, shown.stage("compile"):
        result = build_libraries(
            archs or catalog.ARCHITECTURES, output, jobs=jobs, tensorrt=tensorrt, force=force, verbose=verbose
        )
    if as_json:
        print_json(
            {
                "libraries": [{"path": str(library.path), "bytes": library.bytes} for library in result.libraries],
                "architectures": result.architectures,
                "digest": result.digest,
                "nvcc": result.nvcc_version,
                "tensorrt_headers": result.tensorrt_headers,
                "seconds": result.seconds,
                "skipped": result.skipped,
            }
        )
        return
    print_pairs(
        "Up to date" if result.skipped else f"Built in {result.seconds:.0f} s",
        {str(library.path): bytes_text(library.bytes) for library in result.libraries}
        | {
            "architectures": ", ".join(result.architectures),
            "nvcc": result.nvcc_version,
            "TensorRT headers": result.tensorrt_headers or "none: no TensorRT library",
        },
    )


@command.command("list", cls=Verb)
@json_option
def list_operators(as_json: bool) -> None:
    """List the operators of the plugin library, their types and their limits."""
    import dataclasses

    from mxcompile.cli.output import print_json, print_pairs
    from plugins import catalog

    if as_json:
        print_json([dataclasses.asdict(dataclasses.replace(op, limits=dict(op.limits))) for op in catalog.OPS])
        return
    for op in catalog.OPS:
        print_pairs(
            f"{op.name}: {op.summary}",
            {
                "TensorRT plugin": f"{op.plugin}, version {op.version}",
                "computes": ", ".join(op.onnx),
                "types": ", ".join(op.dtypes)
                + (f"; weights {', '.join(op.weight_dtypes)}" if op.weight_dtypes else ""),
                "architectures": ", ".join(f"{arch} ({catalog.GPU_NAMES[arch]})" for arch in op.architectures),
                "inputs": "; ".join(op.inputs),
                "outputs": "; ".join(op.outputs),
            }
            | dict(op.limits),
        )
