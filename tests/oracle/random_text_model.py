"""The PyTorch definition with random weights, where no checkpoint is needed."""

from __future__ import annotations

import torch

from model_defs.config import ModelConfig
from model_defs.text_model import TextModel


def random_model(config: ModelConfig, seed: int = 0) -> TextModel:
    """fp32; matrices keep the size of what they multiply, so logits are of scale 4."""
    model = TextModel(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return model
