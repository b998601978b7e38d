"""How a build quantizes a graph, and what a quantized engine is held against: the PyTorch definition with weights rounded alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.config import EngineConfig
from model_defs.quantization import SCHEMES, WHOLE
from mxcompile.errors import MxcompileError

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.quantize import QuantizationError


def asked_for(whole: str | None, experts: str | None) -> dict[str, Any] | None:
    """What a build was asked for, in the words of an engine's configuration; None: nothing to quantize."""
    if whole is not None:
        return {"weights": whole}
    return None if experts is None else {"experts": experts}


def quantize(model: ir.Model, how: dict[str, Any]) -> QuantizationError:
    """Quantize a bound graph as an engine's configuration says; the error is known when the weights have been written."""
    from export.quantize import QuantizeExperts
    from export.quantize_blocks import QuantizeWeights

    chosen = QuantizeWeights(how["weights"]) if "weights" in how else QuantizeExperts()
    chosen(model)
    return chosen.error


def described(how: dict[str, Any], error: QuantizationError) -> dict[str, Any]:
    """For the engine's configuration, once all weights have been written."""
    from export.quantize_blocks import described as whole

    return whole(how["weights"], error) if "weights" in how else error.described()


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
        # Ranks that share the experts' inner width have a scale each for their columns of a row.
        parts = config.mapping.moe_tp_size
        return {"quantize_experts": found["experts"]} | ({"expert_parts": parts} if parts > 1 else {})
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
