"""Reference implementations for onnx's evaluator: the plugin operators as their catalog describes them, and the standard operators
that numpy cannot do in 16 bits. Products and sums in fp32, results rounded once to the type of the input, as tensor cores do it.

Written apart from model_defs and from the CUDA kernels. Shape suffixes: B batch, T new tokens, S capacity, H heads, K head channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_attention, op_linear_attention


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


class MatMul(OpRun):
    def _run(self, a, b):  # type: ignore[no-untyped-def]
        return (np.matmul(wide(a), wide(b)).astype(a.dtype),)


class Gemm(OpRun):
    def _run(self, a, b, c=None, alpha=1.0, beta=1.0, transA=0, transB=0):  # type: ignore[no-untyped-def]
        product = alpha * (wide(a).T if transA else wide(a)) @ (wide(b).T if transB else wide(b))
        return ((product if c is None else product + beta * wide(c)).astype(a.dtype),)


class RMSNormalization(OpRun):
    def _run(self, x, weight, axis=-1, epsilon=1e-5, stash_type=1):  # type: ignore[no-untyped-def]
        assert axis == -1
        assert stash_type == 1
        normed = wide(x) / np.sqrt(np.square(wide(x)).mean(axis=-1, keepdims=True) + np.float32(epsilon))
        return ((normed * wide(weight)).astype(x.dtype),)


class Attention(OpRun):
    """The standard's own definition, in fp32."""

    def _run(self, q, k, v, *rest: Any, **attributes: Any):  # type: ignore[no-untyped-def]
        attributes.pop("TRT_decomposable", None)  # how TensorRT may compile it, not what it computes
        values = op_attention.Attention._run(_Permissive(), wide(q), wide(k), wide(v), *rest, **attributes)
        return tuple(None if value is None else value.astype(q.dtype) for value in values)


class _Permissive:
    _validate_attention25 = False


class LinearAttention(OpRun):
    """The plugin: 16-bit q, k, v beside fp32 decay and state."""

    def _run(self, query, key, value, state, decay, **attributes: Any):  # type: ignore[no-untyped-def]
        assert state.dtype == np.float32, "the state must stay fp32"
        assert decay.dtype == np.float32, "the decay must stay fp32"
        return op_linear_attention.LinearAttention._run(self, query, key, value, state, decay, **attributes)


class MoE(OpRun):
    """com.microsoft::MoE token by token, absent inputs as tensors without elements; of experts that lie elsewhere nothing comes."""

    op_domain = "com.microsoft"

    def _run(self, x, router, fc1, bias, fc2, k=None, first_local_expert=None, **_attributes):  # type: ignore[no-untyped-def]
        assert bias.size == 0, "an absent input must have no elements"
        assert router.dtype == np.float32, "the router must stay fp32"
        tokens, gates = wide(x.reshape(-1, x.shape[-1])), router.reshape(-1, router.shape[-1])
        out = np.zeros_like(tokens)
        for n, (token, logits) in enumerate(zip(tokens, gates, strict=True)):
            chosen = np.argsort(-logits, kind="stable")[:k]
            weights = np.exp(logits[chosen] - logits[chosen].max())
            for expert, weight in zip(chosen - (first_local_expert or 0), weights / weights.sum(), strict=True):
                if not 0 <= expert < len(fc1):
                    continue
                gate, up = wide(fc1[expert][0::2]) @ token, wide(fc1[expert][1::2]) @ token
                inner = wide((gate / (1 + np.exp(-gate)) * up).astype(x.dtype))
                out[n] += weight * (wide(fc2[expert]) @ inner)
        return (out.reshape(x.shape).astype(x.dtype),)


class QMoEInt8(OpRun):
    """The plugin's int8 experts: signed bytes times the scale of their row; otherwise as MoE."""

    op_domain = "com.microsoft"

    def _run(self, x, router, fc1, scale1, bias, fc2, scale2, k=None, first_local_expert=None, **_attributes):  # type: ignore[no-untyped-def]
        assert fc1.dtype == fc2.dtype == np.int8
        assert scale1.dtype == scale2.dtype == np.float32
        wide1, wide2 = wide(fc1) * scale1[..., None], wide(fc2) * scale2[..., None]
        return MoE._run(self, x, router, wide1, bias, wide2, k=k, first_local_expert=first_local_expert)


class SoftmaxAttention(OpRun):
    """mxcompile::SoftmaxAttention row by row: reads nothing behind a row's length."""

    op_domain = "mxcompile"

    def _run(self, q_BHTK, keys, values, past_B, new_B, scale=None):  # type: ignore[no-untyped-def]
        out = np.zeros(q_BHTK.shape, np.float32)
        heads, group = q_BHTK.shape[1], q_BHTK.shape[1] // keys.shape[1]
        scale = scale or q_BHTK.shape[-1] ** -0.5
        for row, (past, new) in enumerate(zip(past_B, new_B, strict=True)):
            for head in range(heads):
                for token in range(new):
                    seen = slice(0, past + token + 1)
                    k_SK, v_SK = wide(keys[row, head // group, seen]), wide(values[row, head // group, seen])
                    scores = k_SK @ wide(q_BHTK[row, head, token]) * scale
                    p = np.exp(scores - scores.max())
                    out[row, head, token] = (p / p.sum()) @ v_SK
        return (out.astype(q_BHTK.dtype),)


class DistCollective(OpRun):
    """An exchange between ranks that run in threads: the thread's Meeting is where they exchange."""

    op_domain = ""

    def _run(self, x, collective_operation=None, reduce_op=None, root=None, nb_rank=None):  # type: ignore[no-untyped-def]
        values = Meeting.here.current.exchange(x)
        assert len(values) == nb_rank
        assert root == -1
        if collective_operation == "all_gather":
            assert reduce_op == "none"
            return (np.concatenate(values, axis=0),)
        assert (collective_operation, reduce_op) == ("all_reduce", "sum")
        total = wide(values[0])
        for value in values[1:]:
            total = total + wide(value)
        return (total.astype(x.dtype),)


class Meeting:
    """One rank's place at the table where all leave their values and pick up everybody's."""

    here = threading.local()

    def __init__(self, barrier: threading.Barrier, values: list[Any], rank: int) -> None:
        self._barrier, self._values, self._rank = barrier, values, rank

    def exchange(self, value: np.ndarray) -> list[np.ndarray]:
        self._values[self._rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


def on_ranks(ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` gives on each rank, all ranks at once, exchanging with each other."""
    barrier, values = threading.Barrier(ranks, timeout=300), [None] * ranks

    def one(rank: int) -> Any:
        Meeting.here.current = Meeting(barrier, values, rank)
        try:
            return work(rank)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


NEW_OPS = [MatMul, Gemm, RMSNormalization, Attention, LinearAttention, MoE, QMoEInt8, SoftmaxAttention, DistCollective]
