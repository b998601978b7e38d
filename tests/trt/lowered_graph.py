"""The graph of a small model as TensorRT gets it, run by onnx's reference evaluator, beside the PyTorch definition."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from reference_ops import NEW_OPS

from engines.tensorrt.lowering import Attention, lower
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.parallel.weights import bind_rank_weights
from export.quantize import QuantizeExperts
from export.trace import trace_model
from model_defs.config import ModelConfig
from model_defs.presets import preset
from model_defs.quantization import rounded_rows
from model_defs.text_model import TextModel
from model_defs.weights import Direct, Stacked, weight_recipes

CAPACITY = 32
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def small_config(**changes: object) -> ModelConfig:
    """Seven lightning layers and a softmax layer, small enough for token-by-token references."""
    sizes = dict(hidden_size=32, head_dim=16, rotary_dim=8, intermediate_size=24, vocab_size=64)
    return dataclasses.replace(preset("tiny"), **(sizes | changes))


def random_model(config: ModelConfig, dtype: str, seed: int = 0) -> TextModel:
    """Seeded parameters, the same numbers in every type up to its rounding."""
    model = TextModel(config, TORCH[dtype])
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data = drawn.to(torch.bfloat16).to(parameter.dtype)
    return model


def with_int8_experts(model: TextModel) -> TextModel:
    """The model with its experts quantized and read back; in place."""
    for name, parameter in model.named_parameters():
        if ".fc1." in name or ".fc2." in name:
            rounded = np.stack([rounded_rows(expert) for expert in numpy_of(parameter)])
            parameter.data = torch.from_numpy(rounded).to(parameter.dtype)
    return model


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Also for bfloat16, which torch does not hand to numpy."""
    import ml_dtypes

    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def bind(graph: ir.Model, model: TextModel) -> ir.Model:
    for name, parameter in model.named_parameters():
        graph.graph.initializers[name].const_value = ir.tensor(numpy_of(parameter), name=name)
    return graph


@functools.cache
def traced(config: ModelConfig, dtype: str) -> ir.Model:
    """Tracing takes seconds; passes change a graph in place, so take a clone."""
    return trace_model(config, dtype)


def canonical(config: ModelConfig, dtype: str, model: TextModel) -> ir.Model:
    return bind(traced(config, dtype).clone(), model)


def lowered(config: ModelConfig, dtype: str, model: TextModel, attention: Attention) -> ir.Model:
    return lower(canonical(config, dtype, model), CAPACITY, attention)


def lowered_ranks(
    config: ModelConfig,
    dtype: str,
    model: TextModel,
    attention: Attention,
    mapping: ParallelMapping,
    quantized: bool = False,
) -> list[ir.Model]:
    """The lowered graph of every rank, cut, bound and quantized as a build does it."""
    plan, source = ShardingPlan(config, mapping), MemorySource(model)
    graphs = []
    for rank in mapping.ranks:
        mine = shard(traced(config, dtype), plan, rank)
        bind_rank_weights(mine, plan, rank, source)
        if quantized:
            QuantizeExperts()(mine)
        graphs.append(lower(mine, CAPACITY, attention))
    return graphs


class MemorySource:
    """A checkpoint in memory, of a model's parameters; every weight is then made, none referred to."""

    def __init__(self, model: TextModel) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        parameters = {name: numpy_of(parameter) for name, parameter in model.named_parameters()}
        for name, recipe in weight_recipes(model.config).items():
            value = parameters[name]
            if isinstance(recipe, Direct):
                self.arrays[recipe.tensor] = value
            elif isinstance(recipe, Stacked):
                self.arrays |= dict(zip(recipe.tensors, value, strict=True))
            else:
                self.arrays |= dict(zip(recipe.even, value[:, 0::2], strict=True))
                self.arrays |= dict(zip(recipe.odd, value[:, 1::2], strict=True))
        self.entries = {name: _Entry(array.shape, array.nbytes) for name, array in self.arrays.items()}

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    nbytes: int
    file: str = "memory"
    offset: int = 0
    dtype: str = "not a stored type"


@dataclass
class Evaluated:
    """A graph that steps: keeps its states between calls."""

    evaluator: ReferenceEvaluator
    states: dict[str, np.ndarray]
    past: np.ndarray

    @classmethod
    def of(cls, graph: ir.Model, batch: int) -> Evaluated:
        states = {}
        for value in graph.graph.inputs:
            if (value.name or "").startswith("past_key_values"):
                dims = [batch if i == 0 else (d if isinstance(d, int) else CAPACITY) for i, d in enumerate(value.shape)]
                states[value.name] = np.zeros(dims, value.dtype.numpy())
        return cls(ReferenceEvaluator(ir.to_proto(graph), new_ops=NEW_OPS), states, np.zeros(batch, np.int64))

    def step(self, ids: np.ndarray, new: list[int]) -> np.ndarray:
        """Logits [B, T, N] of all positions."""
        tokens = ids.shape[1]
        feeds = {
            "input_ids": ids,
            "new_lengths": np.array(new, np.int64),
            "past_lengths": self.past,
            "logit_positions": np.tile(np.arange(tokens), (len(ids), 1)),
        }
        names = self.evaluator.output_names
        results = dict(zip(names, self.evaluator.run(None, feeds | self.states), strict=True))
        self.states = {name: results[name.replace("past_key_values", "present")] for name in self.states}
        self.past = self.past + np.array(new)
        return results["logits"]

    def spoil_behind_lengths(self, with_what: float) -> None:
        """Fill what no token has been written to, as another sequence might have left it."""
        for name, state in self.states.items():
            if not name.endswith("recurrent_state"):
                for row, length in enumerate(self.past):
                    state[row, :, length:] = with_what
