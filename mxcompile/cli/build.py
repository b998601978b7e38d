"""`mxcompile build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.config_file import config_option
from mxcompile.cli.options import (
    DTYPES,
    PATH,
    Verb,
    json_option,
    layers_option,
    limits_options,
    parallel_options,
    threads_option,
    verbose_option,
)


@click.command(cls=Verb)
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="ENGINE_DIR", help="Folder to write the engine to.")
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "tensorrt-rtx", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the engine.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of weights and activations.  [default: the target's]")
@click.option("--gpu", metavar="NAME", help="GPU a TensorRT engine is for, such as rtx-4090 or h20.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What ONNX Runtime runs the engine on; cuda needs onnxruntime-gpu.",
)
@click.option(
    "--strip-weights", is_flag=True, help="Leave weights out of a TensorRT engine; read them when it is loaded."
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Keep all large matrices in 8 or 4 bits, quantized on the way (onnxruntime on the CPU).",
)
@click.option(
    "--quantize-experts", type=click.Choice(["int8"]), help="Keep the experts' weights in 8 bits, quantized on the way."
)
@click.option(
    "--taps", is_flag=True, help="Let a TensorRT engine give out inner values, so that validate can name a layer."
)
@layers_option
@limits_options
@parallel_options
@click.option(
    "--build-jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks to build at a time.  [default: as many as cores and memory allow]",
)
@threads_option
@click.option("--force", is_flag=True, help="Replace an engine that is already there.")
@config_option("output")
@json_option
@verbose_option
def command(checkpoint: Path, output: Path, as_json: bool, verbose: bool, **options: Any) -> None:
    """Compile a checkpoint into an engine directory.

    The checkpoint is read, never changed. The engine appears when it is whole: a build that fails or is interrupted
    leaves nothing behind.
    """
    from mxcompile.building import build
    from mxcompile.cli.progress_bars import progress

    with progress(verbose) as shown:
        summary = build(checkpoint, output, progress=shown, **options)
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(summary.to_dict())
        return

    from mxcompile.cli.output import bytes_text, count_text, print_pairs

    print_pairs(
        f"Up to date: {summary.output}" if summary.skipped else f"Built {summary.output}",
        {
            "target": f"{summary.target}, {summary.dtype}",
            "model": f"{summary.layers} layers, {count_text(summary.parameters)} parameters",
            "limits": f"batch {summary.max_batch_size}, {summary.max_seq_len} tokens",
            "size": ", ".join(f"{name} {bytes_text(size)}" for name, size in summary.sizes.items()),
            "read in place": f"{bytes_text(summary.referenced_bytes)} of the checkpoint",
            "time": f"{sum(summary.seconds.values()):.1f} s ("
            + ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary.seconds.items())
            + ")",
            "peak memory": bytes_text(summary.peak_memory),
        }
        | ({} if summary.on_cpu is None else {"on the CPU": _on_cpu(summary.on_cpu)}),
    )


def _on_cpu(operators: list[str]) -> str:
    """What of an engine for CUDA runs on the CPU, after the table of kernels."""
    return f"{', '.join(operators)}: no CUDA kernels" if operators else "nothing: all operators have CUDA kernels"
