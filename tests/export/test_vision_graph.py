"""The graphs of a model with a vision half against the PyTorch definition, run by onnx's own reference evaluator."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from random_text_model import random_model
from test_canonical_graph import TOLERANCE, MoE, tiny_config

from export.errors import ExportError
from export.trace import trace_model
from export.verify import verify_with_onnx
from export.vision import trace_vision, verify_vision
from model_defs.config import ModelConfig
from model_defs.presets import preset
from model_defs.vision_model import VisionModel


def vl_config(**vision: object) -> ModelConfig:
    half = preset("tiny-vl").vision
    assert half is not None
    return tiny_config(
        vision=dataclasses.replace(half, image_token_id=5, **vision), layer_kinds=("lightning", "softmax")
    )


def bound(graph: ir.Model, module: torch.nn.Module) -> ReferenceEvaluator:
    for name, parameter in module.named_parameters():
        graph.graph.initializers[name].const_value = ir.tensor(parameter.detach().numpy(), name=name)
    return ReferenceEvaluator(ir.to_proto(graph), new_ops=[MoE])


def test_a_text_model_keeps_its_graph():
    text = tiny_config(layer_kinds=("lightning", "softmax"))
    plain = ir.to_proto(trace_model(text)).SerializeToString(deterministic=True)
    assert ir.to_proto(trace_model(vl_config().text_only())).SerializeToString(deterministic=True) == plain
    assert b"image_features" not in plain


def test_images_take_the_places_of_tokens_in_any_piece():
    """Two ragged rows, images in both, in one piece and in two: one graph, equal to PyTorch, and only marked tokens change."""
    config = vl_config()
    graph, model = trace_model(config), random_model(config)
    verify_with_onnx(graph)
    evaluator = bound(graph, model)
    random = np.random.default_rng(0)
    ids, features = random.integers(0, 64, (2, 6)), random.standard_normal((4, 32)).astype(np.float32)
    places = np.array([[-1, 2, 0, 3, -1, -1], [1, -1, -1, 1, -1, -1]])
    lengths = np.array([6, 4])

    def piece(
        start: int, end: int, states: list[np.ndarray], marked: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        tokens = end - start
        new, past = np.clip(lengths - start, 0, tokens), np.minimum(lengths, start)
        positions = np.tile(np.arange(tokens), (2, 1))
        arrays = [ids[:, start:end], new, past, positions]
        names = evaluator.input_names
        values = [*arrays, *states, features, marked[:, start:end]]
        found = evaluator.run(None, dict(zip(names, values, strict=True)))
        with torch.no_grad():
            logits, presents, _ = model(
                *map(torch.from_numpy, arrays),
                [torch.from_numpy(state) for state in states],
                torch.from_numpy(features),
                torch.from_numpy(marked[:, start:end].copy()),
            )
        valid = np.arange(tokens) < new[:, None]
        np.testing.assert_allclose(found[0][valid], logits.numpy()[valid], rtol=0, atol=TOLERANCE)
        for mine, theirs in zip(found[1:], presents, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=TOLERANCE)
        return found[0], found[1:]

    fresh = [state.numpy() for state in model.new_states(2, 16)]
    whole, states = piece(0, 6, fresh, places)
    _, half = piece(0, 3, fresh, places)
    rest, split = piece(3, 6, half, places)
    np.testing.assert_allclose(rest[0], whole[0, 3:], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(split[0], states[0], rtol=0, atol=TOLERANCE)
    without, _ = piece(0, 6, fresh, np.full_like(places, -1))
    np.testing.assert_array_equal(without[0, 0], whole[0, 0])
    assert np.abs(without[0, 1:] - whole[0, 1:]).max() > 0.1


@pytest.mark.parametrize("vision", [{}, {"hidden_act": "quick_gelu", "feature_layer": -2}, {"projector_bias": False}])
def test_vision_graph_equals_pytorch(vision: dict):
    config = vl_config(**vision)
    graph = trace_vision(config)
    verify_with_onnx(graph)
    torch.manual_seed(0)
    model = VisionModel(config.vision, config.hidden_size).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
    evaluator = bound(graph, model)
    for tiles in (1, 3):
        pixels = np.random.default_rng(tiles).standard_normal((tiles, 3, 28, 28)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels)).numpy()
        (found,) = evaluator.run(None, {"pixels": pixels})
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_a_broken_vision_graph_is_named():
    graph = trace_vision(vl_config())
    node = next(node for node in graph.graph if node.op_type == "Gelu")
    node.op_type = "Relu"
    with pytest.raises(ExportError, match="Relu"):
        verify_vision(graph, vl_config())
    node.op_type = "Gelu"
    verify_vision(graph, vl_config())
    with pytest.raises(ExportError, match="expected 13"):
        verify_vision(graph, vl_config(num_hidden_layers=6, feature_layer=6))
    with pytest.raises(ExportError, match="no vision half"):
        trace_vision(tiny_config())
