"""The vision half's PyTorch definition with a checkpoint's weights. Imports torch: import the module lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from engines.config import VisionHalf
from model_defs.checkpoint.processor import read_processing
from model_defs.vision_model import VisionModel
from model_defs.weights import vision_recipes
from mxcompile.errors import MxcompileError
from mxcompile.vision_building import vision_half

if TYPE_CHECKING:
    from engines.vision.pixels import PreparedImage
    from model_defs.checkpoint.reader import Checkpoint

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class PyTorchVision:
    """The definition, and what a session says of it. Legend: N tiles, C Y X as of a tile, M rows, n tokens, D hidden size."""

    model: VisionModel
    half: VisionHalf

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: str = "float32") -> PyTorchVision:
        """Of a checkpoint with a vision half. Raises MxcompileError when it has none or for another type."""
        model = load_vision(checkpoint, dtype)
        return cls(model, vision_half(model.config, read_processing(checkpoint.folder, model.config)))

    def rows(self, tiles_NCYX: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the definition gives for some tiles, [M, D], given out as float32."""
        with torch.no_grad():
            dtype = self.model.image_newline.dtype
            return self.model(torch.from_numpy(tiles_NCYX).to(dtype)).to(torch.float32).numpy()

    def features(self, images: Sequence[PreparedImage]) -> NDArray[np.float32]:
        """What the images put into a prompt, packed by the definition, [n, D]."""
        parts = [self.model.pack(torch.from_numpy(self.rows(i.tiles_NCYX)), i.size).numpy() for i in images]
        return np.concatenate(parts)


def load_vision(checkpoint: Checkpoint, dtype: str = "float32") -> VisionModel:
    """`VisionModel` of the checkpoint in float32 or float64. Raises MxcompileError when the checkpoint has no vision half."""
    config = checkpoint.config
    if config.vision is None:
        raise MxcompileError(f"checkpoint {checkpoint.folder}: has no vision half")
    if dtype not in DTYPES:
        raise MxcompileError(f"the vision half's definition runs in {', '.join(DTYPES)}, not in {dtype!r}")
    with torch.device("meta"):
        model = VisionModel(config.vision, config.hidden_size, DTYPES[dtype])
    for name, recipe in vision_recipes(config).items():
        values = torch.from_numpy(recipe.assemble(checkpoint.array).astype(np.dtype(dtype)))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    return model.eval()
