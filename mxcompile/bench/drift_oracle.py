"""Two oracles for the recurrent state of a long decode, and how far rounding may take a state from them.

`Recurrence` is the definition itself in fp64, S_t = lambda S_(t-1) + k_t v_t^T (MiniMax-01 report, section 2.2), fed with what each of
the engine's layers was given: it sees nothing but the recurrence, its keys and its values. `FollowingReference` is the whole PyTorch
definition, which reads the same tokens in chunks, by the chunked algebra: an order of summation of its own.

Shape suffixes: T tokens, D hidden, E experts, H heads, K and V channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mxcompile.validation.metrics import relative_norm

if TYPE_CHECKING:
    from model_defs.text_model import TextModel
    from mxcompile.backends.pytorch import PyTorchSession

U = 2.0**-24
"""Unit roundoff of fp32."""
INPUT_ERROR = 1e-5
"""Of a key or value: an fp32 product over the hidden width is 1e-6 off, its norm and its SiLU as much; with room."""
STEP_ROUNDINGS = 4
"""Units of roundoff by which a step may be off: its product with the decay, its sum, and the decay factor itself, exp(-slope), which
lies below 1 where half a unit in the last place is U / 2 and which runtimes compute within one unit."""


def remembered(slopes_H: NDArray, steps: int) -> NDArray[np.float64]:
    """How many steps a head remembers, [H]: 1 + lambda + ... + lambda^(steps - 1), the sum of a geometric series.

    An error made in every step is forgotten as the state is, so errors add up to at most this many times one step's, whatever the
    number of steps: at first as many as there were steps, in the end 1 / (1 - lambda).
    """
    slopes_H = np.asarray(slopes_H, np.float64)
    return np.expm1(-slopes_H * steps) / np.expm1(-slopes_H)


def recurrence_limit(slopes_H: NDArray, steps: int) -> NDArray[np.float64]:
    """Largest relative error of a head's state against `Recurrence`, [H]: keys and values, then STEP_ROUNDINGS in every step it
    remembers, all of one sign (rounding is not; this is the worst case)."""
    return INPUT_ERROR + STEP_ROUNDINGS * U * remembered(slopes_H, steps)


def model_limit(slopes_H: NDArray, steps: int, states: float) -> NDArray[np.float64]:
    """The same against `FollowingReference`, which rounds as well: twice as much, beside `states`, the limit that states have in
    `mxcompile validate`."""
    return states + 2 * STEP_ROUNDINGS * U * remembered(slopes_H, steps)


class Recurrence:
    """The fp64 states of all lightning layers of one sequence, [H, K, V] each."""

    def __init__(self, model: TextModel) -> None:
        """`model`: for its weights, widened here."""
        config = model.config
        self.layers = [layer for layer, kind in enumerate(config.layer_kinds) if kind == "lightning"]
        self.heads, self.head_dim, self.eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        self.slopes: dict[int, NDArray[np.float64]] = {}
        self.states: dict[int, NDArray[np.float64]] = {}
        self._norm: dict[int, NDArray] = {}
        self._qkv: dict[int, NDArray] = {}
        for layer in self.layers:
            block: Any = model.get_submodule(f"layers.{layer}")
            self.slopes[layer] = np.asarray(block.self_attn.slopes, np.float64)
            self.states[layer] = np.zeros((self.heads, self.head_dim, self.head_dim))
            self._norm[layer] = block.input_layernorm.weight.double().numpy()
            self._qkv[layer] = block.self_attn.qkv_proj.weight.double().numpy()

    def feed(self, inputs: dict[int, NDArray[np.float32]]) -> None:
        """Go on by T tokens. `inputs`: by layer, the residual stream that it was given, [T, D]."""
        for layer in self.layers:
            k_THK, v_THV = self.keys_and_values(layer, inputs[layer])
            slopes_H, tokens = self.slopes[layer], len(k_THK)
            left_TH = np.exp(-np.outer(np.arange(tokens - 1, -1, -1.0), slopes_H))  # of a token, after the last one
            new_HKV = np.einsum("thk,thv->hkv", k_THK * left_TH[:, :, None], v_THV, optimize=True)
            self.states[layer] = np.exp(-slopes_H * tokens)[:, None, None] * self.states[layer] + new_HKV

    def keys_and_values(self, layer: int, x_TD: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a layer, from what it was given."""
        wide_TD = x_TD.astype(np.float64)
        normed_TD = wide_TD / np.sqrt((wide_TD**2).mean(-1, keepdims=True) + self.eps) * self._norm[layer]
        mixed = normed_TD @ self._qkv[layer].T
        parts = (mixed / (1 + np.exp(-mixed))).reshape(len(x_TD), self.heads, 3, self.head_dim)
        return parts[:, :, 1], parts[:, :, 2]

    def errors(self, recurrent: Callable[[int], NDArray]) -> dict[int, NDArray[np.float64]]:
        """By layer, the relative error of each head, [H]. `recurrent(layer)`: the other states, [1, H, K, V]."""
        return {layer: relative_norm(self.states[layer], recurrent(layer)[0], axes=2) for layer in self.layers}


class FollowingReference:
    """The PyTorch definition, following the engine's choice of experts where its own is a near-tie.

    Two programs that round differently choose differently at a near-tie, and both are right; over a hundred thousand tokens that happens
    often. A choice that is no near-tie is not followed, so that it shows.
    """

    def __init__(self, session: PyTorchSession, tie: float) -> None:
        """`tie`: margin of the router's logits below which either expert is right."""
        self.session, self.tie = session, tie
        self.state = session.new_state(1)
        self.followed = self.refused = 0  # choices of this engine that were, and were not, near-ties

    def feed(self, tokens: Sequence[int], router: Sequence[NDArray[np.float32]]) -> None:
        """Go on by these tokens. `router`: by layer, the engine's router logits of them, [T, E]."""
        hooks = []
        try:
            for layer, logits_TE in enumerate(router):
                experts: Any = self.session.model.get_submodule(f"layers.{layer}.block_sparse_moe")
                hooks.append(experts.register_forward_hook(self._hook(logits_TE)))
            self.session.forward(np.asarray([tokens]), [len(tokens)], self.state)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, engine_TE: NDArray[np.float32]) -> Callable[..., Any]:
        import torch

        from model_defs import ops

        def follow(module: Any, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
            k = module.top_k
            own_TE = outputs[1].flatten(0, 1)
            theirs_TE = torch.from_numpy(engine_TE).to(own_TE.dtype)
            own_TK, their_TK = (x.topk(k, -1).indices.sort(-1).values for x in (own_TE, theirs_TE))
            differs_T = (own_TK != their_TK).any(-1)
            if not differs_T.any():
                return None
            ordered_TE = own_TE.sort(-1, descending=True).values
            tie_T = differs_T & (ordered_TE[:, k - 1] - ordered_TE[:, k] <= self.tie)
            self.followed += int(tie_T.sum())
            self.refused += int((differs_T & ~tie_T).sum())
            router_TE = torch.where(tie_T[:, None], theirs_TE, own_TE)
            mixed = ops.mixture_of_experts(inputs[0], router_TE, module.fc1.weight, module.fc2.weight, k)
            return mixed, outputs[1]

        return follow
