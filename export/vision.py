"""The canonical graph of the vision half: standard ONNX operators only, any number of tiles."""

from __future__ import annotations

import onnx_ir as ir
import torch

from export.contract import FEATURES, PIXELS, TILES
from export.errors import ExportError
from export.trace import TORCH_DTYPES, tidied, translated
from export.translate import vision_translation_table
from export.verify import operator_of, same_names, verify_structure
from export.weights import Source, bound_tensor
from model_defs.config import ModelConfig
from model_defs.vision_config import VisionConfig
from model_defs.vision_model import VisionModel
from model_defs.weights import vision_recipes

VISION_OPERATORS = frozenset(
    "Add Concat Constant Conv Expand Gelu LayerNormalization MatMul Mul Reshape Shape Sigmoid Slice Softmax Squeeze Transpose "
    "Unsqueeze".split()
)


def trace_vision(config: ModelConfig, dtype: str = "float32") -> ir.Model:
    """The graph of the vision half of `config`, whose initializers have no bytes yet.

    Input `pixels` [tiles, 3, image_size, image_size]; output `features` [tiles * patches + 1, hidden], as `VisionModel.forward` gives
    them; initializers named as the checkpoint's tensors.
    """
    vision = _vision(config)
    with torch.device("meta"):
        model = VisionModel(vision, config.hidden_size, TORCH_DTYPES[dtype])
        pixels = torch.zeros(2, *_tile(vision), dtype=TORCH_DTYPES[dtype])
    with torch.no_grad():
        shapes = ({0: torch.export.Dim(TILES)},)
        program = torch.export.export(model.eval(), (pixels,), dynamic_shapes=shapes, strict=False)
    graph = translated(program, vision_translation_table())
    graph.graph.name = "mxcompile_vision"
    (only_input,), (only_output,) = graph.graph.inputs, graph.graph.outputs
    only_input.name, only_output.name = PIXELS, FEATURES
    graph = tidied(graph, {PIXELS: (TILES, *_tile(vision))})
    verify_vision(graph, config)
    for name in vision_recipes(config):
        graph.graph.initializers[name].const_value = None
    return graph


def verify_vision(model: ir.Model, config: ModelConfig) -> None:
    """The rules of the vision graph: its input and output, operators of the list alone, as many layers as run, and every weight of
    them. Raises ExportError naming the first one broken.
    """
    vision, graph = _vision(config), model.graph
    verify_structure(model)
    same_names("inputs", [value.name for value in graph.inputs], [PIXELS])
    same_names("outputs", [value.name for value in graph.outputs], [FEATURES])
    dims = [dim if isinstance(dim, int) else dim.value for dim in graph.inputs[0].shape or ()]
    if dims != [TILES, *_tile(vision)]:
        raise ExportError(f"{PIXELS} has dimensions {dims}, expected {[TILES, *_tile(vision)]}")
    operators = [operator_of(node) for node in graph]
    if unknown := sorted(set(operators) - VISION_OPERATORS):
        raise ExportError(f"operators outside the vision set: {', '.join(unknown)}")
    for operator, count in (
        ("LayerNormalization", 1 + 2 * vision.layers_used),
        ("Softmax", vision.layers_used),
        ("Conv", 1),
    ):
        if operators.count(operator) != count:
            raise ExportError(f"{operators.count(operator)} {operator} nodes, expected {count}")
    if missing := sorted(set(vision_recipes(config)) - set(graph.initializers)):
        raise ExportError(f"no initializer for {missing[0]!r} ({len(missing)} missing)")


def bind_vision_weights(model: ir.Model, config: ModelConfig, source: Source) -> None:
    """As `export.weights.bind_weights`, for the vision graph."""
    for name, recipe in vision_recipes(config).items():
        value = model.graph.initializers[name]
        value.const_value = bound_tensor(name, recipe, value, source)


def _vision(config: ModelConfig) -> VisionConfig:
    if config.vision is None:
        raise ExportError("the model has no vision half")
    return config.vision


def _tile(vision: VisionConfig) -> tuple[int, int, int]:
    return vision.num_channels, vision.image_size, vision.image_size
