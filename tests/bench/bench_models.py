"""The model that tests of benchmarks and reports use."""

from __future__ import annotations

import dataclasses

from model_defs.config import ModelConfig
from model_defs.presets import preset


def two_layers() -> ModelConfig:
    """Preset tiny with one layer of each kind."""
    return dataclasses.replace(preset("tiny"), layer_kinds=("lightning", "softmax"), slope_layers=2)
