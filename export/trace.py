"""From the PyTorch definition to the canonical ONNX graph, without a single weight in memory."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch

from export.contract import (
    BATCH,
    CANONICAL_OPSET,
    CAPACITY,
    IMAGE_FEATURES,
    IMAGE_ROWS,
    LOGITS,
    POSITIONS,
    TOKEN_INPUTS,
    TOKENS,
    Dim,
    hidden_tap,
    image_inputs,
    router_tap,
    state_specs,
)
from export.passes import run_passes
from export.passes.fix_reshapes import FixReshapes
from export.passes.name_dimensions import NameDimensions
from export.passes.strip_metadata import StripMetadata
from export.translate import translation_table
from export.verify import verify_canonical, verify_structure
from export.weights import forget_weights
from model_defs.config import ModelConfig
from model_defs.text_model import TextModel

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def trace_program(config: ModelConfig, dtype: str = "float32") -> torch.export.ExportedProgram:
    """Trace the model on the meta device, dynamic in batch, new tokens, logit positions and cache capacity."""
    with torch.device("meta"):
        model = TextModel(config, TORCH_DTYPES[dtype])
    model.eval()
    # Distinct sizes above one, so that the tracer cannot take two dimensions for the same or for a constant.
    sizes = {BATCH: 2, TOKENS: 3, POSITIONS: 5, CAPACITY: 16, IMAGE_ROWS: 7}
    dims = {name: torch.export.Dim(name) for name in sizes}
    images = image_inputs(config)

    def integers(names: tuple[int | str, ...], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros([sizes[d] if isinstance(d, str) else d for d in names], dtype=dtype, device="meta")

    def dynamic(names: tuple[int | str, ...]) -> dict[int, torch.export.Dim]:
        return {axis: dims[name] for axis, name in enumerate(names) if isinstance(name, str)}

    arguments = (
        *(integers(names) for names in TOKEN_INPUTS.values()),
        model.new_states(sizes[BATCH], sizes[CAPACITY]),
        *(integers(d, TORCH_DTYPES[dtype] if name == IMAGE_FEATURES else torch.int64) for name, d in images.items()),
    )
    shapes = (
        *(dynamic(names) for names in TOKEN_INPUTS.values()),
        [dynamic(spec.dims) for spec in state_specs(config)],
        *(dynamic(names) for names in images.values()),
    )
    with torch.no_grad():
        return torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)


def trace_model(config: ModelConfig, dtype: str = "float32") -> ir.Model:
    """The canonical graph of `config` with initializers that have a type and a shape but no bytes yet (see `export.weights`).

    Args:
        config: the architecture; weights are not needed.
        dtype: of weights and activations: float32, float16 or bfloat16. States and logits are as the design says.

    Returns:
        Inputs and outputs named as `export.contract` says; layers' inside values named by `hidden_tap` and `router_tap`;
        initializers named as the parameters of `TextModel`.
    """
    model = translated(trace_program(config, dtype), translation_table(config))
    model.graph.name = "mxcompile_canonical"
    _name_inputs_and_outputs(model.graph, config)
    inputs = TOKEN_INPUTS | {spec.input_name: spec.dims for spec in state_specs(config)} | image_inputs(config)
    model = tidied(model, inputs)
    verify_canonical(model, config)
    forget_weights(model, config)
    return model


def translated(program: torch.export.ExportedProgram, table: dict[Callable, Callable]) -> ir.Model:
    """The ONNX graph of a traced program, node by node."""
    exported = torch.onnx.export(
        program,
        # Its optimizer would fold weights that are not there; the graph needs no folding.
        optimize=False,
        opset_version=18,  # what the translations of torch are written in; the few operators left are the same up to 27
        custom_translation_table=table,
        verbose=False,
    )
    assert exported is not None
    exported.model.opset_imports[""] = CANONICAL_OPSET
    return exported.model


def tidied(model: ir.Model, inputs: dict[str, tuple[Dim, ...]]) -> ir.Model:
    """The graph with dimensions named as those of its `inputs`, and without what only the tracer needs."""
    passes = [
        NameDimensions(inputs),
        FixReshapes(),
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        StripMetadata(),
    ]
    return run_passes(model, passes, verify_structure)


def _name_inputs_and_outputs(graph: ir.Graph, config: ModelConfig) -> None:
    """Give graph inputs and outputs their contract names, and turn the tap outputs into named inside values."""
    specs = state_specs(config)
    names = [*TOKEN_INPUTS, *(spec.input_name for spec in specs), *image_inputs(config)]
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    layers = range(config.num_layers)
    taps = [*(hidden_tap(layer) for layer in layers), *(router_tap(layer) for layer in layers)]
    names = [LOGITS, *(spec.output_name for spec in specs), *taps]
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    graph.outputs[
        1 + len(specs) :
    ] = []  # `del` would leave them marked as outputs, and files would then lack their types
