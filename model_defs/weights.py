"""How checkpoint tensors fill the parameters of `TextModel` and `VisionModel`.

Most parameters are a checkpoint tensor as it is. The experts of a layer are stacked, and their gate and up matrices interleaved row
by row, because that is the form every mixture-of-experts kernel takes. The same table drives loading into PyTorch, binding the exported
graph to the checkpoint and cutting for tensor parallelism.

Every recipe has `groups` of tensors, which say the same in terms of rows: the parameter is the groups one behind the other, and the rows
of a group's tensors alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_defs.config import ModelConfig

ReadArray = Callable[[str], NDArray]  # checkpoint tensor name -> its values, usually a view of the mapped file


@dataclass(frozen=True)
class Direct:
    """The parameter is this checkpoint tensor."""

    tensor: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return ((self.tensor,),)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor of a parameter of this shape."""
        return shape

    def assemble(self, read: ReadArray) -> NDArray:
        return read(self.tensor)


@dataclass(frozen=True)
class Stacked:
    """The parameter stacks one checkpoint tensor per expert: [E, rows, columns]."""

    tensors: tuple[str, ...]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in self.tensors)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each tensor of a parameter of this shape."""
        return shape[1:]

    def assemble(self, read: ReadArray) -> NDArray:
        first = read(self.tensors[0])
        out = np.empty((len(self.tensors), *first.shape), dtype=first.dtype)
        for expert, name in enumerate(self.tensors):
            out[expert] = read(name)
        return out

    def experts(self) -> Iterator[Stacked]:
        """The recipes of each expert alone."""
        return (Stacked((name,)) for name in self.tensors)


@dataclass(frozen=True)
class InterleavedStack:
    """Per expert, rows of `even` and `odd` alternate: [E, 2 * rows, columns]."""

    even: tuple[str, ...]
    odd: tuple[str, ...]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple(zip(self.even, self.odd, strict=True))

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for pair in self.groups for name in pair)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each tensor of a parameter of this shape."""
        return (shape[1] // 2, shape[2])

    def assemble(self, read: ReadArray) -> NDArray:
        rows, columns = read(self.even[0]).shape
        out = np.empty((len(self.even), 2 * rows, columns), dtype=read(self.even[0]).dtype)
        for expert, (even, odd) in enumerate(zip(self.even, self.odd, strict=True)):
            out[expert, 0::2] = read(even)
            out[expert, 1::2] = read(odd)
        return out

    def experts(self) -> Iterator[InterleavedStack]:
        """The recipes of each expert alone."""
        return (InterleavedStack((even,), (odd,)) for even, odd in zip(self.even, self.odd, strict=True))


Recipe = Direct | Stacked | InterleavedStack


def weight_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Recipe of every parameter of `TextModel(config)`, by the parameter's name, in the order of the model."""
    return dict(_recipes(config))


def vision_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Recipe of every parameter of `VisionModel`: the tensor of the same name. Layers that do not run have none."""
    assert config.vision is not None
    beyond = tuple(
        f"vision_tower.vision_model.encoder.layers.{layer}."
        for layer in range(config.vision.layers_used, config.vision.num_hidden_layers)
    )
    return {name: Direct(name) for name in config.vision.tensors(config.hidden_size) if not name.startswith(beyond)}


def _recipes(config: ModelConfig) -> Iterator[tuple[str, Recipe]]:
    prefix = config.tensor_prefix
    yield "embed_tokens.weight", Direct(f"{prefix}model.embed_tokens.weight")
    for layer, kind in enumerate(config.layer_kinds):
        here, there = f"layers.{layer}", f"{prefix}model.layers.{layer}"
        projections = "qkv_proj output_gate out_proj norm" if kind == "lightning" else "q_proj k_proj v_proj o_proj"
        for name in ["input_layernorm", *(f"self_attn.{p}" for p in projections.split()), "post_attention_layernorm"]:
            yield f"{here}.{name}.weight", Direct(f"{there}.{name}.weight")
        moe = f"{there}.block_sparse_moe"
        w1, w2, w3 = (
            tuple(f"{moe}.experts.{e}.w{i}.weight" for e in range(config.num_local_experts)) for i in (1, 2, 3)
        )
        yield f"{here}.block_sparse_moe.gate.weight", Direct(f"{moe}.gate.weight")
        yield f"{here}.block_sparse_moe.fc1.weight", InterleavedStack(w1, w3)
        yield f"{here}.block_sparse_moe.fc2.weight", Stacked(w2)
    yield "norm.weight", Direct(f"{prefix}model.norm.weight")
    yield "lm_head.weight", Direct(f"{prefix}lm_head.weight")
