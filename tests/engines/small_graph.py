"""A small canonical graph with random weights, and the same model in fp64 numpy, token by token, as its oracle.

Written apart from the exporter and from the PyTorch definition, so that the engine is checked against both.

Shape suffixes: B batch, T new tokens, P positions, S cache capacity, D hidden, H heads, G kv heads, K head dim,
E experts, I expert inner width, N vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

D, H, G, K, E, I, N, ROTARY = 32, 4, 2, 16, 4, 24, 61, 8
KINDS = ("lightning", "softmax", "lightning")
ALPHA = 2.0
THETA = 10000.0
EPS, LIGHTNING_EPS = 1e-5, 1e-6
W = H * K


def slopes(layer: int) -> np.ndarray:
    return (2.0 ** (-8.0 * (np.arange(H) + 1) / H) * (1 - layer / (len(KINDS) - 1) + 1e-5)).astype(np.float32)


def weight_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed": (N, D), "norm": (D,), "lm_head": (N, D)}
    for layer, kind in enumerate(KINDS):
        mine: dict[str, tuple[int, ...]] = {"norm1": (D,), "norm2": (D,), "gate": (E, D)}
        if kind == "lightning":
            mine |= {"qkv": (3 * W, D), "mixnorm": (W,), "outgate": (W, D), "out": (D, W)}
        else:
            mine |= {"q": (W, D), "k": (G * K, D), "v": (G * K, D), "out": (D, W)}
        for expert in range(E):
            mine |= {f"w1.{expert}": (I, D), f"w3.{expert}": (I, D), f"w2.{expert}": (D, I)}
        shapes |= {f"l{layer}.{name}": shape for name, shape in mine.items()}
    return shapes


def initializer_shapes() -> dict[str, tuple[int, ...]]:
    """The graph's initializers: weights as they are, but experts stacked."""
    shapes = {name: shape for name, shape in weight_shapes().items() if ".w" not in name}
    for layer in range(len(KINDS)):
        shapes |= {f"l{layer}.fc1": (E, 2 * I, D), f"l{layer}.fc2": (E, D, I)}
    return shapes


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes().items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif name != "embed":
            values = values * (2.0 if name == "lm_head" else 1.5) / np.sqrt(shape[-1])
        weights[name] = values.astype(np.float32)
    return weights


# ------------------------------------------------------------------------------------------------ graph


def _moe(layer: int) -> str:
    l = f"l{layer}"
    return f"""
  {l}_g = RMSNormalization<epsilon = {EPS}>({l}_x1, {l}_norm2)
  {l}_gt = Transpose<perm = [1, 0]>({l}_gate)
  {l}_router = MatMul({l}_g, {l}_gt)
  {l}_r2 = Reshape({l}_router, experts)
  {l}_moe = com.microsoft.MoE<k = 2, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0,
    activation_beta = 0.0, normalize_routing_weights = 1>({l}_g, {l}_r2, {l}_fc1, , {l}_fc2)
  {l}_ga = Mul({l}_g, alpha)
  {l}_x = Add({l}_ga, {l}_moe)"""


def _lightning(layer: int, x: str) -> str:
    l = f"l{layer}"
    decay = ", ".join(repr(float(-s)) for s in slopes(layer))
    return f"""
  {l}_h = RMSNormalization<epsilon = {EPS}>({x}, {l}_norm1)
  {l}_qkvt = Transpose<perm = [1, 0]>({l}_qkv)
  {l}_p = MatMul({l}_h, {l}_qkvt)
  {l}_ps = Sigmoid({l}_p)
  {l}_pa = Mul({l}_p, {l}_ps)
  {l}_ph = Reshape({l}_pa, split_heads)
  {l}_q4, {l}_k4, {l}_v4 = Split<axis = -1, num_outputs = 3>({l}_ph)
  {l}_q = Reshape({l}_q4, join)
  {l}_k0 = Reshape({l}_k4, join)
  {l}_v0 = Reshape({l}_v4, join)
  {l}_k = Mul({l}_k0, valid)
  {l}_v = Mul({l}_v0, valid)
  {l}_slope = Constant<value = float[{H}] {{{decay}}}>()
  {l}_decay = Mul(valid, {l}_slope)
  {l}_o, present__{layer}__recurrent_state = LinearAttention<q_num_heads = {H}, kv_num_heads = {H}, update_rule = "gated",
    scale = 1.0>({l}_q, {l}_k, {l}_v, past_key_values__{layer}__recurrent_state, {l}_decay)
  {l}_on = RMSNormalization<epsilon = {LIGHTNING_EPS}>({l}_o, {l}_mixnorm)
  {l}_ogt = Transpose<perm = [1, 0]>({l}_outgate)
  {l}_og = MatMul({l}_h, {l}_ogt)
  {l}_os = Sigmoid({l}_og)
  {l}_m = Mul({l}_os, {l}_on)
  {l}_outt = Transpose<perm = [1, 0]>({l}_out)
  {l}_u = MatMul({l}_m, {l}_outt)
  {l}_ha = Mul({l}_h, alpha)
  {l}_x1 = Add({l}_ha, {l}_u)"""


def _softmax(layer: int, x: str) -> str:
    l = f"l{layer}"
    lines = [f"  {l}_h = RMSNormalization<epsilon = {EPS}>({x}, {l}_norm1)"]
    for name, heads in (("q", H), ("k", G), ("v", G)):
        lines += [
            f"  {l}_{name}t = Transpose<perm = [1, 0]>({l}_{name})",
            f"  {l}_{name}p = MatMul({l}_h, {l}_{name}t)",
            f"  {l}_{name}s = Constant<value = int64[4] {{0, 0, {heads}, {K}}}>()",
            f"  {l}_{name}4 = Reshape({l}_{name}p, {l}_{name}s)",
            f"  {l}_{name}h = Transpose<perm = [0, 2, 1, 3]>({l}_{name}4)",
        ]
    return (
        "\n"
        + "\n".join(lines)
        + f"""
  {l}_qr = RotaryEmbedding<rotary_embedding_dim = {ROTARY}>({l}_qh, cos, sin)
  {l}_kr = RotaryEmbedding<rotary_embedding_dim = {ROTARY}>({l}_kh, cos, sin)
  present__{layer}__key = TensorScatter<axis = 2>(past_key_values__{layer}__key, {l}_kr, past_lengths)
  present__{layer}__value = TensorScatter<axis = 2>(past_key_values__{layer}__value, {l}_vh, past_lengths)
  {l}_n = Shape<start = 2, end = 3>({l}_qr)
  {l}_written = Add(past_lengths, {l}_n)
  {l}_a = Attention<is_causal = 1>({l}_qr, present__{layer}__key, present__{layer}__value, , , , {l}_written)
  {l}_at = Transpose<perm = [0, 2, 1, 3]>({l}_a)
  {l}_aj = Reshape({l}_at, join)
  {l}_outt = Transpose<perm = [1, 0]>({l}_out)
  {l}_u = MatMul({l}_aj, {l}_outt)
  {l}_ha = Mul({l}_h, alpha)
  {l}_x1 = Add({l}_ha, {l}_u)"""
    )


def graph_text() -> str:
    inputs = ["int64[batch,tokens] input_ids", "int64[batch] new_lengths", "int64[batch] past_lengths"]
    inputs.append("int64[batch,positions] logit_positions")
    # Weights come as inputs here, so that every name is known; `model` makes initializers of them.
    inputs += [f"float{list(shape)} {name.replace('.', '_')}" for name, shape in initializer_shapes().items()]
    outputs = [f"float[batch,positions,{N}] logits"]
    body, x = "", "x0"
    for layer, kind in enumerate(KINDS):
        if kind == "lightning":
            states = {"recurrent_state": f"float[batch,{H},{K},{K}]"}
        else:
            states = dict.fromkeys(("key", "value"), f"float[batch,{G},capacity,{K}]")
        inputs += [f"{kind_} past_key_values__{layer}__{role}" for role, kind_ in states.items()]
        outputs += [f"{kind_} present__{layer}__{role}" for role, kind_ in states.items()]
        body += (_lightning if kind == "lightning" else _softmax)(layer, x) + _moe(layer)
        x = f"l{layer}_x"
    frequency = ", ".join(repr(float(np.float32(THETA ** (-2 * i / ROTARY)))) for i in range(ROTARY // 2))
    return f"""<ir_version: 11, opset_import: ["" : 27, "com.microsoft" : 1]>
canonical ({", ".join(inputs)}) => ({", ".join(outputs)}) {{
  zero = Constant<value = int64 {{0}}>()  one = Constant<value = int64 {{1}}>()  ax1 = Constant<value = int64[1] {{1}}>()
  ax2 = Constant<value = int64[1] {{2}}>()  alpha = Constant<value = float {{{ALPHA}}}>()
  last = Constant<value = int64[1] {{-1}}>()
  split_heads = Constant<value = int64[4] {{0, 0, {H}, {3 * K}}}>()  join = Constant<value = int64[3] {{0, 0, {W}}}>()
  experts = Constant<value = int64[2] {{-1, {E}}}>()
  frequency = Constant<value = float[{ROTARY // 2}] {{{frequency}}}>()
  t1 = Shape<start = 1, end = 2>(input_ids)  t = Squeeze(t1)
  offsets = Range(zero, t, one)
  new1 = Unsqueeze(new_lengths, ax1)  valid0 = Less(offsets, new1)  valid1 = Unsqueeze(valid0, ax2)
  valid = Cast<to = 1>(valid1)
  past1 = Unsqueeze(past_lengths, ax1)  place = Add(past1, offsets)  placef = Cast<to = 1>(place)
  place1 = Unsqueeze(placef, ax2)  angle = Mul(place1, frequency)  cos = Cos(angle)  sin = Sin(angle)
  x0 = Gather(embed, input_ids)
{body}
  where1 = Unsqueeze(logit_positions, ax2)
  width = Constant<value = int64[3] {{1, 1, {D}}}>()
  where2 = Expand(where1, width)
  chosen = GatherElements<axis = 1>({x}, where2)
  final = RMSNormalization<epsilon = {EPS}>(chosen, norm)
  lm_t = Transpose<perm = [1, 0]>(lm_head)
  logits = MatMul(final, lm_t)
}}"""


TAPS = tuple(f"l{layer}_{what}" for layer in range(len(KINDS)) for what in ("x", "router"))


def interleaved(weights: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """Gate and up rows alternating, [E, 2I, D]."""
    pairs = [
        np.stack([weights[f"l{layer}.w1.{e}"], weights[f"l{layer}.w3.{e}"]], 1).reshape(2 * I, D) for e in range(E)
    ]
    return np.stack(pairs)


def write_checkpoint(folder: Path, weights: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """All weights one after another in `weights.dat`; (offset, length) by name."""
    folder.mkdir(parents=True, exist_ok=True)
    places, data = {}, b"header"  # an odd offset to start with, as in a safetensors file of any header size
    data += b" " * (-len(data) % 8)
    for name, array in weights.items():
        places[name] = (len(data), array.nbytes)
        data += array.tobytes()
    (folder / "weights.dat").write_bytes(data)
    return places


def model(weights: dict[str, np.ndarray], checkpoint: Path | None = None) -> ir.Model:
    """The canonical graph, its weights bound: to the checkpoint's bytes where they can be used, else lazily."""
    proto = onnx.parser.parse_model(graph_text())
    del proto.graph.value_info[:]
    bound = ir.from_proto(proto)
    for value in (*bound.graph.inputs, *bound.graph.outputs):  # the text format knows no dots in names
        value.name = (value.name or "").replace("__", ".")
    places = write_checkpoint(checkpoint, weights) if checkpoint is not None else {}
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, array in weights.items():
        if ".w" in name:  # experts: stacked below
            continue
        if checkpoint is not None:
            offset, length = places[name]
            path = str(checkpoint / "weights.dat")
            tensors[name] = ir.ExternalTensor(
                path, offset, length, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name
            )
        else:
            tensors[name] = ir.tensor(array, name=name)
    for layer in range(len(KINDS)):
        fc1, fc2 = f"l{layer}.fc1", f"l{layer}.fc2"

        def first(layer: int = layer) -> ir.TensorProtocol:
            return ir.tensor(interleaved(weights, layer))

        def second(layer: int = layer) -> ir.TensorProtocol:
            return ir.tensor(np.stack([weights[f"l{layer}.w2.{e}"] for e in range(E)]))

        tensors[fc1] = ir.LazyTensor(first, ir.DataType.FLOAT, ir.Shape((E, 2 * I, D)), name=fc1)
        tensors[fc2] = ir.LazyTensor(second, ir.DataType.FLOAT, ir.Shape((E, D, I)), name=fc2)
    weight_inputs = {value.name: value for value in bound.graph.inputs}
    for name, tensor in tensors.items():
        value = weight_inputs[name.replace(".", "_")]
        bound.graph.inputs.remove(value)
        value.name, value.const_value = name, tensor
        bound.graph.register_initializer(value)
    return infer_shapes(bound)


def infer_shapes(bound: ir.Model) -> ir.Model:
    """Shapes of inside values, as an exporter leaves them; the contrib op's output has its input's shape."""
    from onnx_ir.passes.common import ShapeInferencePass

    kept = {name: value.const_value for name, value in bound.graph.initializers.items()}
    for _ in KINDS:  # inference stops at each MoE node, which has no schema
        for value in bound.graph.initializers.values():
            value.const_value = None
        inferred = ShapeInferencePass()(bound).model
        for node in inferred.graph:
            if node.op_type == "MoE":
                node.outputs[0].shape, node.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        bound = inferred
    ShapeInferencePass()(bound)
    for name, tensor in kept.items():
        bound.graph.initializers[name].const_value = tensor
    return bound


# ----------------------------------------------------------------------------------------------- oracle


@dataclass
class Sequence64:
    """One sequence in fp64; `push` takes a token and returns its logits."""

    weights: dict[str, np.ndarray]
    length: int = 0
    recurrent: dict[int, np.ndarray] = field(default_factory=dict)
    keys: dict[int, list[np.ndarray]] = field(default_factory=dict)
    values: dict[int, list[np.ndarray]] = field(default_factory=dict)
    taps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    closest_choice: float = np.inf  # smallest gap between the second and the third expert so far

    def __post_init__(self) -> None:
        self.weights = {name: array.astype(np.float64) for name, array in self.weights.items()}

    def push(self, token: int) -> np.ndarray:
        w = self.weights
        x = w["embed"][token]
        for layer, kind in enumerate(KINDS):
            mine = {name[len(f"l{layer}.") :]: a for name, a in w.items() if name.startswith(f"l{layer}.")}
            h = _rms(x, mine["norm1"], EPS)
            mix = self._lightning if kind == "lightning" else self._softmax
            x1 = ALPHA * h + mix(layer, h, mine)
            g = _rms(x1, mine["norm2"], EPS)
            router = mine["gate"] @ g
            order = np.argsort(-router)
            self.closest_choice = min(self.closest_choice, float(router[order[1]] - router[order[2]]))
            share = np.exp(router[order[:2]] - router[order[0]])
            share /= share.sum()
            x = ALPHA * g
            for expert, part in zip(order[:2], share, strict=True):
                inner = _silu(mine[f"w1.{expert}"] @ g) * (mine[f"w3.{expert}"] @ g)
                x = x + part * (mine[f"w2.{expert}"] @ inner)
            self.taps.setdefault(f"l{layer}_x", []).append(x)
            self.taps.setdefault(f"l{layer}_router", []).append(router)
        self.length += 1
        return w["lm_head"] @ _rms(x, w["norm"], EPS)

    def _lightning(self, layer: int, h: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
        qkv = _silu(w["qkv"] @ h).reshape(H, 3, K)
        state = self.recurrent.setdefault(layer, np.zeros((H, K, K)))
        state = np.exp(-slopes(layer).astype(np.float64))[:, None, None] * state
        state = state + qkv[:, 1, :, None] * qkv[:, 2, None, :]
        self.recurrent[layer] = state
        out = np.einsum("hk,hkv->hv", qkv[:, 0], state).reshape(W)
        gate = 1 / (1 + np.exp(-(w["outgate"] @ h)))
        return w["out"] @ (gate * _rms(out, w["mixnorm"], LIGHTNING_EPS))

    def _softmax(self, layer: int, h: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
        q = _rotate((w["q"] @ h).reshape(H, K), self.length)
        self.keys.setdefault(layer, []).append(_rotate((w["k"] @ h).reshape(G, K), self.length))
        self.values.setdefault(layer, []).append((w["v"] @ h).reshape(G, K))
        keys, values = np.stack(self.keys[layer]), np.stack(self.values[layer])
        heads = []
        for head in range(H):
            scores = keys[:, head // (H // G)] @ q[head] / np.sqrt(K)
            scores = np.exp(scores - scores.max())
            heads.append(scores @ values[:, head // (H // G)] / scores.sum())
        return w["out"] @ np.concatenate(heads)

    def push_all(self, tokens: np.ndarray) -> np.ndarray:
        """Logits after every token, [tokens, N]."""
        return np.array([self.push(int(token)) for token in tokens])


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _rotate(x: np.ndarray, position: int) -> np.ndarray:
    half = ROTARY // 2
    frequency = np.array([np.float32(THETA ** (-2 * i / ROTARY)) for i in range(half)])
    angle = (np.float32(position) * frequency).astype(np.float64)  # fp32 by definition
    first, second = x[:, :half], x[:, half:ROTARY]
    turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    return np.concatenate([*turned, x[:, ROTARY:]], axis=1)
