"""Lightning attention: linear attention whose state fades by a scalar per head and token (facts, 2.3).

    S_t = exp(g_t) S_(t-1) + k_t v_t^T,      o_t = q_t S_t          (no 1/sqrt(d) scale, no normaliser)

Legend: B batch, T tokens, H heads, K and V channels of a head, C tokens of a chunk, W = H * K.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # arithmetic per token grows with the chunk (4 C d + 4 d^2); 64 keeps the two terms near each other


@torch.library.custom_op("mxcompile::lightning_attention", mutates_args=())
def lightning_attention(
    q_BTW: Tensor, k_BTW: Tensor, v_BTW: Tensor, log_decay_BTH: Tensor, past_state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens, chunk by chunk.

    A token with log-decay 0 and k = v = 0 leaves the state bit-identical: that is how padding is written.

    Args:
        q_BTW, k_BTW, v_BTW: heads side by side in the last axis; fp32 or fp64.
        log_decay_BTH: natural logarithm of the decay, every value <= 0; dtype of q.
        past_state_BHKV: state before the first token; fp32 (fp64 when q is).

    Returns:
        output [B, T, W] in q's dtype, and the state after the last token [B, H, K, V] in past_state's dtype.
    """
    batch, tokens, heads = log_decay_BTH.shape
    state_BHKV = past_state_BHKV.to(q_BTW.dtype)

    def split(x_BTW: Tensor) -> Tensor:
        return x_BTW.reshape(batch, tokens, heads, -1).transpose(1, 2)

    q_BHTK, k_BHTK, v_BHTV = split(q_BTW), split(k_BTW), split(v_BTW)
    log_decay_BHT = log_decay_BTH.transpose(1, 2)
    outputs = []
    for start in range(0, tokens, CHUNK):
        chunk = slice(start, min(start + CHUNK, tokens))
        output_BHCV, state_BHKV = _one_chunk(
            q_BHTK[:, :, chunk], k_BHTK[:, :, chunk], v_BHTV[:, :, chunk], log_decay_BHT[:, :, chunk], state_BHKV
        )
        outputs.append(output_BHCV)
    if not outputs:
        return torch.empty_like(q_BTW), past_state_BHKV.clone()
    output_BTW = torch.cat(outputs, dim=2).transpose(1, 2).reshape(batch, tokens, -1)
    # An op must not return its own input.
    return output_BTW.contiguous(), state_BHKV.to(past_state_BHKV.dtype).contiguous()


def _one_chunk(
    q_BHCK: Tensor, k_BHCK: Tensor, v_BHCV: Tensor, log_decay_BHC: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Output of one chunk and the state after it. Every exponent is <= 0, so nothing can overflow."""
    faded_BHC = log_decay_BHC.cumsum(-1)  # decay from the chunk's start up to and including each token
    between_BHCC = faded_BHC.unsqueeze(-1) - faded_BHC.unsqueeze(-2)
    causal_CC = torch.ones(between_BHCC.shape[-2:], dtype=torch.bool, device=q_BHCK.device).tril()
    decay_BHCC = between_BHCC.masked_fill(~causal_CC, float("-inf")).exp()
    inside_BHCV = ((q_BHCK @ k_BHCK.transpose(-1, -2)) * decay_BHCC) @ v_BHCV
    before_BHCV = (q_BHCK * faded_BHC.exp().unsqueeze(-1)) @ state_BHKV
    last_BH1 = faded_BHC[..., -1:]
    kept_BHCK = k_BHCK * (last_BH1 - faded_BHC).exp().unsqueeze(-1)
    state_BHKV = last_BH1.exp().unsqueeze(-1) * state_BHKV + kept_BHCK.transpose(-1, -2) @ v_BHCV
    return inside_BHCV + before_BHCV, state_BHKV


@lightning_attention.register_fake
def _(
    q_BTW: Tensor, k_BTW: Tensor, v_BTW: Tensor, log_decay_BTH: Tensor, past_state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v_BTW), torch.empty_like(past_state_BHKV)
