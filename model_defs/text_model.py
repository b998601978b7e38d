"""The text model of the MiniMax-Text-01 family, for one device (facts, 2 and 4.4).

One forward pass serves prefill, chunked prefill and decode: it takes the states in and gives the states out, in batches of
right-padded rows. Padding never touches a state.

Legend: B batch, T new tokens (padded), P positions at which logits are wanted, D hidden, H heads, G key/value heads,
K channels of a head, W = H * K, R half of the rotary channels, S cache capacity, E experts, I expert inner width,
N vocabulary, M rows of image features.

Numerics: weights and activations in `dtype`; in 16-bit models the recurrent state, the recurrence, rotary angles, softmax, router
and lm_head run in fp32. In an fp64 model everything does, but rotary angles are still fp32 products, as they are part of the
model's definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model_defs import ops
from model_defs.config import ModelConfig
from model_defs.constants import decay_slopes, rotary_frequencies


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the parts that must not be rounded to 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class StepContext:
    """What every layer of one forward pass needs to know about its rows."""

    past_lengths_B: Tensor  # int64
    valid_BT: Tensor  # bool: the token is not padding
    cos_BTR: Tensor
    sin_BTR: Tensor


class Taps(NamedTuple):
    """Inside values for finding the layer where two runs part."""

    hidden: list[Tensor]  # per layer: the residual stream behind it, [B, T, D]
    router_logits: list[Tensor]  # per layer: [B, T, E]


class Weight(nn.Module):
    """A bare matrix or vector, so that parameters keep the checkpoint's names ("qkv_proj.weight")."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

    def linear(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)

    def linear_wide(self, x: Tensor) -> Tensor:
        """The product in fp32 even when x and the weight are of 16 bits."""
        wide = wide_dtype(x.dtype)
        return torch.nn.functional.linear(x.to(wide), self.weight.to(wide))

    def linear_of(self, x: Tensor, index: int) -> Tensor:
        """The product with one matrix of a stack."""
        return x @ self.weight[index].T

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, [..., columns]."""
        return torch.nn.functional.embedding(ids, self.weight)


class LightningAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.attention_width
        self.heads, self.head_dim, self.eps = config.num_attention_heads, config.head_dim, config.lightning_norm_eps
        self.qkv_proj = Weight(
            3 * width, hidden, dtype=dtype
        )  # rows grouped per head: q, k, v of head 0, then of head 1, ...
        self.output_gate = Weight(width, hidden, dtype=dtype)
        self.out_proj = Weight(hidden, width, dtype=dtype)
        self.norm = Weight(width, dtype=dtype)
        # Not a parameter: derived from (layer, head), kept in fp32 and out of checkpoints.
        self.slopes = decay_slopes(config, layer).tolist()

    def forward(self, x_BTD: Tensor, context: StepContext, past_state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = x_BTD.shape
        wide = wide_dtype(x_BTD.dtype)
        qkv = torch.nn.functional.silu(self.qkv_proj.linear(x_BTD)).reshape(
            batch, tokens, self.heads, 3 * self.head_dim
        )
        q, k, v = (part.reshape(batch, tokens, -1).to(wide) for part in qkv.split(self.head_dim, dim=-1))
        valid_BT1 = context.valid_BT.unsqueeze(-1).to(wide)
        log_decay_BTH = ops.log_decay(valid_BT1, self.slopes)
        mixed_BTW, present_BHKV = ops.lightning_attention(
            q, k * valid_BT1, v * valid_BT1, log_decay_BTH, past_state_BHKV
        )
        normed_BTW = ops.rms_norm(mixed_BTW.to(x_BTD.dtype), self.norm.weight, self.eps)
        gated_BTW = torch.sigmoid(self.output_gate.linear(x_BTD)) * normed_BTW
        return self.out_proj.linear(gated_BTW), present_BHKV


class SoftmaxAttention(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.attention_width
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = Weight(width, hidden, dtype=dtype)
        self.k_proj = Weight(self.kv_heads * self.head_dim, hidden, dtype=dtype)
        self.v_proj = Weight(self.kv_heads * self.head_dim, hidden, dtype=dtype)
        self.o_proj = Weight(hidden, width, dtype=dtype)

    def forward(
        self, x_BTD: Tensor, context: StepContext, key_cache_BGSK: Tensor, value_cache_BGSK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x_BTD.shape

        def heads(x: Tensor, count: int) -> Tensor:
            return x.reshape(batch, tokens, count, self.head_dim).transpose(1, 2)

        def turn(x: Tensor) -> Tensor:
            wide = context.cos_BTR.dtype
            return ops.rotary_embedding(x.to(wide), context.cos_BTR, context.sin_BTR).to(x.dtype)

        q_BHTK = turn(heads(self.q_proj.linear(x_BTD), self.heads))
        k_BGTK = turn(heads(self.k_proj.linear(x_BTD), self.kv_heads))
        v_BGTK = heads(self.v_proj.linear(x_BTD), self.kv_heads)
        keys_BGSK = ops.append_to_cache(key_cache_BGSK, k_BGTK, context.past_lengths_B)
        values_BGSK = ops.append_to_cache(value_cache_BGSK, v_BGTK, context.past_lengths_B)
        mixed_BHTK = ops.softmax_attention(q_BHTK, keys_BGSK, values_BGSK, context.past_lengths_B)
        mixed_BTW = mixed_BHTK.transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_proj.linear(mixed_BTW), keys_BGSK, values_BGSK


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        experts, inner, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.gate = Weight(experts, hidden, dtype=dtype)
        # The experts stacked; `weights.py` says how checkpoint tensors fill them.
        self.fc1 = Weight(experts, 2 * inner, hidden, dtype=dtype)
        self.fc2 = Weight(experts, hidden, inner, dtype=dtype)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mixed expert outputs [B, T, D] and the router logits [B, T, E]."""
        router_BTE = self.gate.linear_wide(x_BTD)
        return self.mix(x_BTD, router_BTE.flatten(0, 1)), router_BTE

    def mix(self, x_BTD: Tensor, router_NE: Tensor) -> Tensor:
        """The experts' outputs [B, T, D], chosen and weighted by the router's logits [B * T, E]."""
        return ops.mixture_of_experts(x_BTD, router_NE, self.fc1.weight, self.fc2.weight, self.top_k)


class DecoderLayer(nn.Module):
    """Attention, then experts, each with the postnorm residual: the branch that is carried is the normed input."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        lightning = config.layer_kinds[layer] == "lightning"
        self.eps = config.rms_norm_eps
        self.attention_scale = config.lightning_scale if lightning else config.softmax_scale
        self.mlp_scale = config.mlp_scale
        self.self_attn = LightningAttention(config, layer, dtype) if lightning else SoftmaxAttention(config, dtype)
        self.block_sparse_moe = MixtureOfExperts(config, dtype)
        self.input_layernorm = Weight(config.hidden_size, dtype=dtype)
        self.post_attention_layernorm = Weight(config.hidden_size, dtype=dtype)

    def forward(self, x_BTD: Tensor, context: StepContext, states: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        normed_BTD = ops.rms_norm(x_BTD, self.input_layernorm.weight, self.eps)
        attended_BTD, *presents = self.self_attn(normed_BTD, context, *states)
        scale = self.attention_scale
        x_BTD = ops.scaled_residual(normed_BTD, attended_BTD, scale.alpha, scale.beta)
        normed_BTD = ops.rms_norm(x_BTD, self.post_attention_layernorm.weight, self.eps)
        mixed_BTD, router_BTE = self.block_sparse_moe(normed_BTD)
        x_BTD = ops.scaled_residual(normed_BTD, mixed_BTD, self.mlp_scale.alpha, self.mlp_scale.beta)
        return x_BTD, presents, router_BTE


class TextModel(nn.Module):
    """Embedding, decoder layers, final norm and lm_head.

    States are a flat list in layer order: one tensor for a lightning layer (the recurrent state, fp32 [B, H, K, K]), two for a
    softmax layer (key and value cache, [B, G, S, K] in the model's dtype).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, dtype) for layer in range(config.num_layers))
        self.norm = Weight(config.hidden_size, dtype=dtype)
        self.lm_head = Weight(config.vocab_size, config.hidden_size, dtype=dtype)
        self.frequencies = rotary_frequencies(config.rotary_dim, config.rope_theta).tolist()

    def forward(
        self,
        input_ids_BT: Tensor,
        new_lengths_B: Tensor,
        past_lengths_B: Tensor,
        logit_positions_BP: Tensor,
        states: list[Tensor],
        image_features_MD: Tensor | None = None,
        image_positions_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Taps]:
        """One step over right-padded rows.

        Args:
            input_ids_BT: int64; row b holds new_lengths[b] tokens, then padding of any valid id.
            new_lengths_B: int64, 0 .. T.
            past_lengths_B: int64, tokens of each row seen before.
            logit_positions_BP: int64, indices into T at which logits are wanted.
            states: as the class says; caches of capacity S >= max(past_lengths) + T.
            image_features_MD: rows that take the place of tokens' embeddings, in the model's dtype; M >= 1. Both or none.
            image_positions_BT: int64; which of them a token takes, -1 for one that keeps its own embedding.

        Returns:
            logits [B, P, N] (fp32; fp64 in an fp64 model), the new states in the same order, and the taps.
        """
        context = self._context(input_ids_BT, new_lengths_B, past_lengths_B)
        x_BTD = self.embed_tokens.rows(input_ids_BT)
        if image_features_MD is not None and image_positions_BT is not None:
            x_BTD = ops.place_images(x_BTD, image_features_MD, image_positions_BT)
        remaining, presents, taps = list(states), [], Taps([], [])
        for layer, kind in zip(self.layers, self.config.layer_kinds, strict=True):
            count = 1 if kind == "lightning" else 2
            mine, remaining = remaining[:count], remaining[count:]
            x_BTD, new_states, router_BTE = layer(x_BTD, context, mine)
            presents += new_states
            taps.hidden.append(x_BTD)
            taps.router_logits.append(router_BTE)
        chosen_BPD = x_BTD.gather(1, logit_positions_BP.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))
        logits_BPN = self.lm_head.linear_wide(ops.rms_norm(chosen_BPD, self.norm.weight, self.config.rms_norm_eps))
        return logits_BPN, presents, taps

    def _context(self, input_ids_BT: Tensor, new_lengths_B: Tensor, past_lengths_B: Tensor) -> StepContext:
        offsets_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        positions_BT = past_lengths_B.unsqueeze(1) + offsets_T
        angles_BTR = ops.rotary_angles(positions_BT, self.frequencies).to(wide_dtype(self.dtype))
        return StepContext(past_lengths_B, offsets_T < new_lengths_B.unsqueeze(1), angles_BTR.cos(), angles_BTR.sin())

    def new_states(self, batch: int, capacity: int) -> list[Tensor]:
        """Zero states for `batch` rows and `capacity` cached tokens, on the model's device."""
        config, device = self.config, self.norm.weight.device
        recurrent = (batch, config.num_attention_heads, config.head_dim, config.head_dim)
        cache = (batch, config.num_key_value_heads, capacity, config.head_dim)
        states: list[Tensor] = []
        for kind in config.layer_kinds:
            if kind == "lightning":
                states.append(torch.zeros(recurrent, dtype=wide_dtype(self.dtype), device=device))
            else:
                states += [torch.zeros(cache, dtype=self.dtype, device=device) for _ in range(2)]
        return states
