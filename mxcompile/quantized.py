"""What a quantized engine is held against: the PyTorch definition with weights rounded alike, and its yardstick."""

from __future__ import annotations

from typing import Any

from engines.config import EngineConfig
from model_defs.quantization import SCHEMES, WHOLE
from mxcompile.errors import MxcompileError


def reference_options(config: EngineConfig) -> dict[str, Any]:
    """Options of `PyTorchSession.load` that round the weights as the engine's were; none for an engine that is not quantized.

    Raises MxcompileError for a quantization that is not known.
    """
    found = config.quantization
    if found is None:
        return {}
    if found.get("weights") in WHOLE and "experts" not in found:
        return {"quantize": found["weights"]}
    if found.get("experts") in SCHEMES and "weights" not in found:
        return {"quantize_experts": found["experts"]}
    raise MxcompileError(
        f"no limits are set for engines quantized as {found!r}; validate an engine without quantization"
    )


def yardstick_options(config: EngineConfig) -> dict[str, Any]:
    """The same, with activations rounded where the engine's products take them in int8."""
    return reference_options(config) | ({"int8_activations": True} if int8_activations(config) else {})


def int8_activations(config: EngineConfig) -> bool:
    """Whether the engine rounds what goes into products with its weights."""
    return config.quantization is not None and "activations" in config.quantization


def numbers_of(config: EngineConfig) -> str:
    """What an engine computes in, for people."""
    return f"{config.dtype} with int8 activations" if int8_activations(config) else config.dtype


def rounded_weights_of(quantization: dict[str, Any]) -> str:
    """What an engine's quantization rounded, for people: "int8 experts", or "int4 weights with int8 activations"."""
    if "experts" in quantization:
        return f"{quantization['experts']} experts"
    return f"{quantization['weights']} weights" + (" with int8 activations" if "activations" in quantization else "")
