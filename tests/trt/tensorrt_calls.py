"""What our code uses of TensorRT's Python module, read from the code, held against a module that is here.

    python tests/trt/tensorrt_calls.py tensorrt        prints what is missing or called in another way; nothing where all is well

Members of the module itself stand in the code (`trt.Builder`); of which class a variable is, OBJECTS says. A call fits where an overload in
the member's documentation (pybind11 writes them there) takes as many positional arguments and has the keywords. A method of a class that is
derived from TensorRT's must have the base's number of parameters. Needs no GPU.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILDER = {"builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig"}
OBJECTS: dict[str, dict[str, str]] = {
    "engines/tensorrt/build.py": BUILDER,
    "engines/tensorrt/gpus.py": {"builder_config": "IBuilderConfig"},
    "engines/tensorrt/messages.py": {},
    "engines/tensorrt/network.py": BUILDER
    | {"parser": "OnnxParser", "error": "ParserError", "layer": "ILayer", "out": "ITensor"},
    "engines/tensorrt/profiles.py": BUILDER | {"profile": "IOptimizationProfile", "tensor": "ITensor"},
    "engines/tensorrt/runtime.py": {"runtime": "Runtime"},
    "engines/tensorrt/session.py": {"_engine": "ICudaEngine", "context": "IExecutionContext"},
    "engines/tensorrt/stream.py": {},
    "engines/tensorrt/timing.py": {"config": "IBuilderConfig", "cache": "ITimingCache"},
    "plugins/tensorrt_runtime.py": {"registry": "IPluginRegistry", "config": "IBuilderConfig"},
}
# The documentation speaks of a parameter that TensorRT does not give: tests/trt/test_trt_build.py writes every plan with one less.
DOCUMENTED_WRONG = {"IStreamWriter.write": 1}
# Only TensorRT-RTX compiles for a GPU that is not there, and only where the target is that one.
OF_RTX = ("ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability")


@dataclass(frozen=True)
class Use:
    """A member of the module by its path, and how it is called, if it is: number of positional arguments, and keywords."""

    member: str
    where: str
    called: tuple[int, tuple[str, ...]] | None = None
    derived: int | None = None  # parameters of our own method that takes its place, self among them


def uses() -> Iterator[Use]:
    """Of all files, in order."""
    for file, variables in OBJECTS.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (member := _member(node, variables)) is not None:
                call = calls.get(id(node))
                keywords = () if call is None else tuple(word.arg for word in call.keywords if word.arg)
                called = None if call is None else (len(call.args), keywords)
                yield Use(member, f"{file}:{node.lineno}", called)
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    base_name = _member(base, {}) if isinstance(base, ast.Attribute) else None
                    for method in node.body if base_name else ():
                        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                            count = len(method.args.args)
                            yield Use(f"{base_name}.{method.name}", f"{file}:{method.lineno}", derived=count)


def _member(node: ast.Attribute, variables: dict[str, str]) -> str | None:
    """The path of `trt.A.b`, `variable.b` or `self._variable.b` inside the module; None for anything else."""
    names = [node.attr]
    value: ast.expr = node.value
    while isinstance(value, ast.Attribute):
        names.insert(0, value.attr)
        value = value.value
    if not isinstance(value, ast.Name):
        return None
    names.insert(0, value.id)
    if names[0] == "self" and len(names) == 3:
        names = names[1:]
    if names[0] == "trt":
        return None if names[1].startswith("__") else ".".join(names[1:])
    return ".".join([variables[names[0]], *names[1:]]) if names[0] in variables and len(names) == 2 else None


def problems(module: Any, rtx: bool) -> list[str]:
    """Every use that `module` has no such member for, or another signature."""
    found = []
    for use in uses():
        if not rtx and use.member.startswith(OF_RTX):
            continue
        value: Any = module
        for name in use.member.split("."):
            value = getattr(value, name, None)
        if value is None:
            found.append(f"{use.where}: there is no {use.member}")
        elif use.called is not None and not _takes(value, *use.called, use.member.endswith("__init__")):
            found.append(f"{use.where}: {use.member} is called with {use.called}; it is {_signatures(value)}")
        elif use.derived is not None and not any(
            use.derived == len(one) - DOCUMENTED_WRONG.get(use.member, 0) for one in _signatures(value)
        ):
            found.append(f"{use.where}: {use.member} has {use.derived} parameters; it is {_signatures(value)}")
    return found


def _takes(value: Any, count: int, keywords: tuple[str, ...], unbound: bool) -> bool:
    """Whether an overload of `value` (a class: of its constructor) takes such a call; `unbound`: self is among the arguments."""
    for parameters in _signatures(value.__init__ if isinstance(value, type) else value):
        own = [entry for entry in parameters if unbound or entry[0] != "self"]
        needed = [name for name, optional in own[count:] if not optional]
        if count <= len(own) and set(keywords) <= {name for name, _ in own} and set(needed) <= set(keywords):
            return True
    return False


def _signatures(value: Any) -> list[list[tuple[str, bool]]]:
    """Name and whether it has a default of every parameter, for every overload that the documentation lists."""
    found = []
    for line in (value.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((.*)\) -> ", line.strip())
        if match and match[1] != "*args, **kwargs":
            parts = _split(match[1])
            found.append([(part.split(":")[0].strip(), " = " in part) for part in parts])
    return found


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def main(flavour: str) -> int:
    sys.path.insert(0, str(ROOT))
    from plugins.tensorrt_runtime import load_tensorrt

    module = load_tensorrt(flavour)
    found = problems(module, flavour == "tensorrt-rtx")
    print(f"{flavour} {module.__version__}: {len(list(uses()))} uses, {len(found)} of them wrong", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
