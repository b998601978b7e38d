"""The vision half's PyTorch definition with a checkpoint's weights. Imports torch: import the module lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from model_defs.vision_model import VisionModel
from model_defs.weights import vision_recipes
from mxcompile.errors import MxcompileError

if TYPE_CHECKING:
    from model_defs.checkpoint.reader import Checkpoint

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def load_vision(checkpoint: Checkpoint, dtype: str = "float32") -> VisionModel:
    """`VisionModel` of the checkpoint in float32 or float64. Raises MxcompileError when the checkpoint has no vision half."""
    config = checkpoint.config
    if config.vision is None:
        raise MxcompileError(f"checkpoint {checkpoint.folder}: has no vision half")
    with torch.device("meta"):
        model = VisionModel(config.vision, config.hidden_size, DTYPES[dtype])
    for name, recipe in vision_recipes(config).items():
        values = torch.from_numpy(recipe.assemble(checkpoint.array).astype(np.dtype(dtype)))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    return model.eval()
