"""`mxcompile doctor`."""

from __future__ import annotations

import click

from mxcompile.cli.options import Verb, json_option


@click.command(cls=Verb)
@json_option
def command(as_json: bool) -> int:
    """Say what this machine can build and run.

    Exits with 3 when it cannot run engines of the default target, onnxruntime.
    """
    from mxcompile.machine import Machine, examine

    machine: Machine = examine()
    code = 0 if next(status for status in machine.targets if status.target == "onnxruntime").can_run else 3
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(machine.to_dict())
        return code

    from mxcompile.cli.output import bytes_text, print_pairs, print_table

    print_pairs(
        "Machine",
        {
            "mxcompile": machine.mxcompile,
            "python": machine.python,
            "system": machine.system,
            "cpu": f"{machine.cpu}, {machine.cores} cores",
            "memory": f"{bytes_text(machine.memory_available or 0)} free of {bytes_text(machine.memory_total or 0)}",
            "disk": f"{bytes_text(machine.disk_free)} free here",
            "C++ compiler": machine.compiler or "none",
            "nvcc": machine.nvcc or "none",
            "GPU": "; ".join(f"{gpu.name} (sm {gpu.compute_capability}, {gpu.memory_mib} MiB)" for gpu in machine.gpus)
            or "none",
        },
    )
    print_pairs(
        "Libraries",
        {name: version or "not installed" for name, version in machine.libraries.items()}
        | {"onnxruntime providers": ", ".join(machine.providers) or "none"},
    )
    print_table(
        "Targets",
        ("target", "build", "run"),
        [
            (
                status.target,
                "yes" if status.can_build else f"needs {', '.join(status.build_missing)}",
                "yes" if status.can_run else f"needs {', '.join(status.run_missing)}",
            )
            for status in machine.targets
        ],
    )
    return code
