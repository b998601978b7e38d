"""Small models for tests, and sessions and oracles on their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recurrence_model import RecurrenceModel

from model_defs.checkpoint.create import create_checkpoint
from model_defs.checkpoint.reader import Checkpoint
from model_defs.config import ModelConfig, ResidualScale

PLAIN = ModelConfig(
    family="text-01",
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=48,
    num_local_experts=6,
    num_experts_per_tok=2,
    vocab_size=96,
    layer_kinds=("lightning", "lightning", "softmax", "lightning"),
    slope_layers=4,
    rotary_dim=16,
    rope_theta=1e7,
    lightning_scale=ResidualScale(1.7, 1.0),
    softmax_scale=ResidualScale(1.7, 1.0),
    mlp_scale=ResidualScale(1.7, 1.0),
    max_position_embeddings=4096,
)
"""Two kinds of layers in every neighbourhood: softmax behind lightning, and lightning behind softmax."""


def plain_checkpoint(folder: Path, **changes: object) -> Checkpoint:
    """A checkpoint of PLAIN with random weights of logit scale 6."""
    config = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
    create_checkpoint(config, folder, seed=3, dtype="float32", with_tokenizer=False)
    return Checkpoint.open(folder)


def oracle(checkpoint: Checkpoint) -> RecurrenceModel:
    """The fp64 recurrence on this checkpoint."""
    config = checkpoint.config
    return RecurrenceModel(
        checkpoint.array,
        layer_kinds=config.layer_kinds,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        rotary_dim=config.rotary_dim,
        theta=config.rope_theta,
        slope_layers=config.slope_layers,
        lightning_scale=(config.lightning_scale.alpha, config.lightning_scale.beta),
        softmax_scale=(config.softmax_scale.alpha, config.softmax_scale.beta),
        mlp_scale=(config.mlp_scale.alpha, config.mlp_scale.beta),
    )
