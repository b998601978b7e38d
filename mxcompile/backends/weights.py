"""Weights of the PyTorch definition: held in memory, or left in the checkpoint and read whenever they are used.

Shape suffixes: R rows, C columns, n rows of activations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from engines.errors import EngineError
from model_defs import ops
from model_defs.quantization import LEVELS, SCHEMES, WHOLE, BlockScheme, block_scheme
from model_defs.text_model import MixtureOfExperts, TextModel, Weight, wide_dtype
from model_defs.weights import Recipe, weight_recipes

if TYPE_CHECKING:
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.config import ModelConfig

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Numbers that are widened at a time: 8 MiB in fp32, little beside a model that does not fit into memory.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class Rounding:
    """What weights become before the definition computes with them; see `PyTorchSession.load`."""

    dtype: str = "float32"
    quantize_experts: str | None = None
    quantize: str | None = None
    expert_parts: int = 1

    def __post_init__(self) -> None:
        """Raises EngineError for what the definition does not know."""
        if self.dtype not in DTYPES:
            raise EngineError(f"the PyTorch definition runs in {', '.join(DTYPES)}, not in {self.dtype!r}")
        if self.quantize_experts not in (None, *SCHEMES):
            raise EngineError(
                f"the PyTorch definition knows no experts in {self.quantize_experts!r}; known: {', '.join(SCHEMES)}"
            )
        if self.quantize not in (None, *WHOLE):
            raise EngineError(
                f"the PyTorch definition knows no weights in {self.quantize!r}; known: {', '.join(WHOLE)}"
            )

    def apply(self, name: str, stored_RC: NDArray) -> torch.Tensor:
        """Whole rows of the parameter `name`, as they are stored, in the definition's type; a copy. No row depends on another."""
        values_RC = _tensor(stored_RC)
        scheme = None if self.quantize is None else block_scheme(name, self.quantize)
        if self.quantize_experts is not None and name.endswith((".fc1.weight", ".fc2.weight")):
            parts = self.expert_parts if name.endswith(".fc2.weight") else 1  # ranks have whole rows of fc1
            scheme = BlockScheme(8, values_RC.shape[1] // parts)
        if scheme is not None:
            values_RC = rounded(values_RC.float(), scheme)
        return values_RC.to(torch.float64 if self.dtype == "float64" else torch.float32).to(DTYPES[self.dtype])


def rounded(weight_RC: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    """float32 weights quantized and read back, the very numbers of `model_defs.quantization`, on all of torch's threads.

    Experts with a scale per row are blocks as wide as a row.
    """
    blocks = weight_RC.unflatten(-1, (-1, scheme.block))
    most, least = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    if scheme.bits == 8:
        low, high, scale = -LEVELS, LEVELS, torch.maximum(most, -least) / LEVELS
    else:
        low, high = -scheme.zero, scheme.zero - 1
        largest = torch.where(most > -least, most, least)
        # Of largest magnitudes with both signs the first one counts. A search of all blocks would take longer than all the rest.
        tied = (most == -least).squeeze(-1)
        largest[tied] = blocks[tied].gather(-1, blocks[tied].abs().argmax(-1, keepdim=True))
        scale = largest / low
    if not torch.isfinite(scale).all():
        raise ValueError("a weight is not finite")
    scale.masked_fill_(scale == 0, 1)
    return ((blocks / scale).round_().clamp_(low, high) * scale).flatten(-2)


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, rounding: Rounding | None = None, stream: bool = False
) -> TextModel:
    """`TextModel(config)` with the checkpoint's weights, float32 unless `rounding` says otherwise.

    With `stream`, matrices stay in the checkpoint; only vectors and routers are held. Products are then the same but for their order of
    summation, a block of rows at a time, and of the experts only those are read that some token chose. What the system keeps of
    the files in memory is its own to take back. Without, one matrix at a time is held twice.
    """
    rounding = rounding or Rounding()
    with torch.device("meta"):
        model = TextModel(config, DTYPES[rounding.dtype])
    for name, recipe in weight_recipes(config).items():
        owner, _, leaf = name.rpartition(".")
        shape = tuple(model.get_parameter(name).shape)
        if stream and len(shape) > 1 and not owner.endswith(".gate"):
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, StreamedWeight(name, recipe, shape, checkpoint, rounding))
            continue
        array = recipe.assemble(checkpoint.array)
        if array.shape != shape:
            raise _wrong_shape(name, array.shape, shape)
        values = rounding.apply(name, array.reshape(-1, shape[-1])).reshape(shape)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and stream:
            fc1, fc2 = module.fc1.linear_of, module.fc2.linear_of
            module.mix = functools.partial(ops.mix_experts, top_k=module.top_k, fc1=fc1, fc2=fc2)  # type: ignore[method-assign]
    return model


def too_large(config: ModelConfig, dtype: str) -> bool:
    """Whether the model takes more than four fifths of the memory that is to be had; the rest is for activations and states."""
    from mxcompile.machine import available_memory

    with torch.device("meta"):
        needed = sum(parameter.nbytes for parameter in TextModel(config, DTYPES[dtype]).parameters())
    available = available_memory()
    return available is not None and needed > 0.8 * available


class StreamedWeight(Weight):
    """A matrix, or a stack of them, that is read from the checkpoint whenever it is used."""

    def __init__(
        self, name: str, recipe: Recipe, shape: tuple[int, ...], checkpoint: Checkpoint, rounding: Rounding
    ) -> None:
        torch.nn.Module.__init__(self)  # not Weight's: nothing is allocated
        self._name, self._shape, self._rounding = name, shape, rounding
        # Tensors whose rows alternate make one matrix, as the recipe's groups say.
        self._matrices = [[checkpoint.array(tensor) for tensor in group] for group in recipe.groups]
        for stored in (array for group in self._matrices for array in group):
            if stored.shape != recipe.stored_shape(shape):
                raise _wrong_shape(name, stored.shape, recipe.stored_shape(shape))

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_of(x, 0)

    def linear_wide(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_of(x.to(wide_dtype(x.dtype)), 0)

    def linear_of(self, x: torch.Tensor, index: int) -> torch.Tensor:
        rows, columns = self._shape[-2:]
        out_nR = x.new_empty(*x.shape[:-1], rows)
        step = max(1, _BLOCK // columns) * len(self._matrices[index])
        for start in range(0, rows, step):
            block_RC = self._block(index, slice(start, start + step))
            out_nR[..., start : start + step] = torch.nn.functional.linear(x, block_RC.to(x.dtype))
        return out_nR

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        unique, places = ids.unique(return_inverse=True)
        ((stored_RC,),) = self._matrices
        return self._rounding.apply(self._name, stored_RC[unique.numpy()])[places]

    def _block(self, index: int, rows: slice) -> torch.Tensor:
        """Rows of one matrix in the definition's type; `rows` begins and ends where all alternating tensors do."""
        group = self._matrices[index]
        part = slice(rows.start // len(group), rows.stop // len(group))
        return self._rounding.apply(self._name, _alternate([stored_RC[part] for stored_RC in group]))


def _wrong_shape(name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> EngineError:
    return EngineError(f"weight {name} has shape {list(found)}, the model needs {list(needed)}")


def _alternate(arrays: list[NDArray]) -> NDArray:
    """Their rows in turn."""
    return arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1).reshape(-1, arrays[0].shape[-1])


def _tensor(array: NDArray) -> torch.Tensor:
    """A copy, because the checkpoint's arrays are views of a file that must not be written to. torch widens bfloat16 on
    all of its threads.
    """
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    kept = array.dtype in (np.float16, np.float32, np.float64)
    return torch.from_numpy(np.array(array if kept else array.astype(np.float32)))
