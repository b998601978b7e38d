"""Small checkpoints, and ways to damage them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from model_defs.config import ModelConfig, ResidualScale

MICRO = ModelConfig(
    family="text-01",
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=24,
    intermediate_size=16,
    num_local_experts=3,
    num_experts_per_tok=2,
    vocab_size=300,
    layer_kinds=("lightning", "lightning", "softmax"),
    slope_layers=3,
    rotary_dim=12,
    rope_theta=1e7,
    lightning_scale=ResidualScale(1.5, 1.0),
    softmax_scale=ResidualScale(1.6, 1.0),
    mlp_scale=ResidualScale(1.7, 1.0),
    max_position_embeddings=4096,
    bos_token_id=297,
    eos_token_id=298,
)


def raw_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, or with these header bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def load_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder as the safetensors library reads it, with its numpy dtype."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replaces the folder's weights by one file that the safetensors library writes."""
    from safetensors.numpy import save_file

    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
