"""The text model in plain fp64 numpy, token by token and head by head: an oracle that shares no code with the packages.

Written from reference/minimax01-facts.md, sections 2 and 3. Nothing is batched, chunked or stacked; slopes, rotary frequencies and
routing are computed here again. Slow, and meant to be read.

Shape suffixes: D hidden, H heads, K channels of a head, E experts, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Memory:
    """What a sequence remembers."""

    length: int = 0
    states: dict[int, np.ndarray] = field(default_factory=dict)  # layer -> [H, K, K]
    keys: dict[int, list[np.ndarray]] = field(default_factory=dict)  # layer -> per token [G, K]
    values: dict[int, list[np.ndarray]] = field(default_factory=dict)


@dataclass
class Step:
    """What one token gave."""

    logits_N: np.ndarray
    hidden: list[np.ndarray]  # per layer [D]
    router: list[np.ndarray]  # per layer [E]


class RecurrenceModel:
    """`read` gives checkpoint tensors by their original names; the sizes are those of the configuration."""

    def __init__(
        self,
        read: Callable[[str], np.ndarray],
        *,
        layer_kinds: Sequence[str],
        heads: int,
        kv_heads: int,
        head_dim: int,
        experts: int,
        experts_per_token: int,
        rotary_dim: int,
        theta: float,
        slope_layers: int,
        lightning_scale: tuple[float, float],
        softmax_scale: tuple[float, float],
        mlp_scale: tuple[float, float],
    ) -> None:
        self._tensors: dict[str, np.ndarray] = {}
        self._read = read
        self.kinds, self.slope_layers = layer_kinds, slope_layers
        self.H, self.G, self.K = heads, kv_heads, head_dim
        self.E, self.top = experts, experts_per_token
        self.rotary, self.theta = rotary_dim, theta
        self.attention_scale, self.mlp_scale = {"lightning": lightning_scale, "softmax": softmax_scale}, mlp_scale

    def push(self, token: int, memory: Memory) -> Step:
        """One token; changes `memory`."""
        x_D = self._weight("model.embed_tokens.weight")[token]
        hidden, router = [], []
        for layer, kind in enumerate(self.kinds):
            name = f"model.layers.{layer}"
            h_D = rms_norm(x_D, self._weight(f"{name}.input_layernorm.weight"), 1e-5)
            mix = self._lightning if kind == "lightning" else self._softmax
            alpha, beta = self.attention_scale[kind]
            x_D = alpha * h_D + beta * mix(layer, h_D, memory)  # the residual is the normed input
            g_D = rms_norm(x_D, self._weight(f"{name}.post_attention_layernorm.weight"), 1e-5)
            mixed_D, router_E = self._experts(f"{name}.block_sparse_moe", g_D)
            alpha, beta = self.mlp_scale
            x_D = alpha * g_D + beta * mixed_D
            hidden.append(x_D)
            router.append(router_E)
        memory.length += 1
        normed_D = rms_norm(x_D, self._weight("model.norm.weight"), 1e-5)
        return Step(self._weight("lm_head.weight") @ normed_D, hidden, router)

    def run(self, tokens: Sequence[int]) -> tuple[list[Step], Memory]:
        """A fresh sequence."""
        memory = Memory()
        return [self.push(int(token), memory) for token in tokens], memory

    def _lightning(self, layer: int, h_D: np.ndarray, memory: Memory) -> np.ndarray:
        name = f"model.layers.{layer}.self_attn"
        qkv = silu(self._weight(f"{name}.qkv_proj.weight") @ h_D)
        state_HKK = memory.states.setdefault(layer, np.zeros((self.H, self.K, self.K)))
        heads = []
        for head in range(self.H):
            start = head * 3 * self.K  # rows are grouped per head: q, k, v
            q = qkv[start : start + self.K]
            k = qkv[start + self.K : start + 2 * self.K]
            v = qkv[start + 2 * self.K : start + 3 * self.K]
            state_HKK[head] = np.exp(-self.slope(layer, head)) * state_HKK[head] + np.outer(k, v)
            heads.append(q @ state_HKK[head])
        normed = rms_norm(np.concatenate(heads), self._weight(f"{name}.norm.weight"), 1e-6)
        gate = 1 / (1 + np.exp(-(self._weight(f"{name}.output_gate.weight") @ h_D)))
        return self._weight(f"{name}.out_proj.weight") @ (gate * normed)

    def slope(self, layer: int, head: int) -> float:
        """2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5), an fp32 number times a double, kept in fp32."""
        base = np.float32(2.0 ** (-8.0 * (head + 1) / self.H))
        return float(base * np.float32(1 - layer / max(self.slope_layers - 1, 1) + 1e-5))

    def _softmax(self, layer: int, h_D: np.ndarray, memory: Memory) -> np.ndarray:
        name = f"model.layers.{layer}.self_attn"
        q_HK = self._turn((self._weight(f"{name}.q_proj.weight") @ h_D).reshape(self.H, self.K), memory.length)
        k_GK = self._turn((self._weight(f"{name}.k_proj.weight") @ h_D).reshape(self.G, self.K), memory.length)
        v_GK = (self._weight(f"{name}.v_proj.weight") @ h_D).reshape(self.G, self.K)
        keys, values = memory.keys.setdefault(layer, []), memory.values.setdefault(layer, [])
        keys.append(k_GK)
        values.append(v_GK)
        heads = []
        for head in range(self.H):
            group = head // (self.H // self.G)
            scores = np.array([q_HK[head] @ key[group] for key in keys]) / np.sqrt(self.K)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads.append(sum(w * value[group] for w, value in zip(weights, values, strict=True)))
        return self._weight(f"{name}.o_proj.weight") @ np.concatenate(heads)

    def _turn(self, x: np.ndarray, position: int) -> np.ndarray:
        """Rotary embedding of the first `rotary` channels, pairs (i, i + rotary / 2); angles are fp32 products."""
        half = self.rotary // 2
        out = x.copy()
        for i in range(half):
            exponent = np.float32(2 * i) / np.float32(self.rotary)
            frequency = np.float32(1) / np.float32(self.theta ** float(exponent))
            angle = float(np.float32(position) * frequency)
            a, b = x[:, i], x[:, i + half]
            out[:, i] = a * np.cos(angle) - b * np.sin(angle)
            out[:, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def _experts(self, name: str, g_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        router_E = self._weight(f"{name}.gate.weight") @ g_D
        share_E = np.exp(router_E - router_E.max())
        share_E /= share_E.sum()
        chosen = np.argsort(-share_E)[: self.top]
        total = share_E[chosen].sum()
        out_D = np.zeros_like(g_D)
        for expert in chosen:
            w1, w2, w3 = (self._weight(f"{name}.experts.{expert}.w{i}.weight") for i in (1, 2, 3))
            out_D += share_E[expert] / total * (w2 @ (silu(w1 @ g_D) * (w3 @ g_D)))
        return out_D, router_E

    def _weight(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            self._tensors[name] = self._read(name).astype(np.float64)
        return self._tensors[name]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
