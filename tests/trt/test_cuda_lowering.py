"""What ONNX Runtime's CUDA provider is given in 16 bits computes what the PyTorch definition does, in onnx's reference evaluator.

The operators of ONNX Runtime's own domain are reference implementations here, with the provider's demands on types; the comparison and its
limits are those of test_lowered_numerics.py.
"""

from __future__ import annotations

from typing import Any

import lowered_graph
import numpy as np
import pytest
import reference_ops
from lowered_graph import Evaluated, canonical, small_config
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_linear_attention
from reference_ops import wide
from test_lowered_numerics import RATIO, STEPS, Torch, assert_states_as_near, relative_rms

from engines.onnxruntime.kernels import without_kernel
from engines.onnxruntime.lowering import lower_for_cuda


class FusedMatMul(OpRun):
    op_domain = "com.microsoft"

    def _run(self, a, b, transB=0, **_attributes):  # type: ignore[no-untyped-def]
        assert a.dtype == b.dtype
        return (np.matmul(wide(a), wide(b).T if transB else wide(b)).astype(a.dtype),)


class LinearAttention(OpRun):
    """All in float32."""

    op_domain = "com.microsoft"

    def _run(self, *values: Any, **attributes: Any):  # type: ignore[no-untyped-def]
        assert all(value.dtype == np.float32 for value in values)
        return op_linear_attention.LinearAttention._run(self, *values, **attributes)


class MoE(OpRun):
    """One type for tokens, logits and weights; the softmax is over all experts, then of the chosen."""

    op_domain = "com.microsoft"

    def _run(self, x, router, fc1, bias, fc2, **attributes: Any):  # type: ignore[no-untyped-def]
        assert bias is None
        assert x.dtype == router.dtype == fc1.dtype == fc2.dtype
        none = np.zeros(0, np.float32)
        return reference_ops.MoE._run(self, x, wide(router), fc1, none, fc2, **attributes)


class GroupQueryAttention(OpRun):
    """Writes new keys and values behind `past` = seqlens_k + 1 - T; row by row, reads nothing behind a query's position."""

    op_domain = "com.microsoft"

    def _run(  # type: ignore[no-untyped-def]
        self, q, k, v, past_key, past_value, seqlens_k, total, num_heads=None, kv_num_heads=None, scale=None
    ):
        assert q.dtype == k.dtype == v.dtype == past_key.dtype == past_value.dtype
        assert q.dtype != np.float32, "the provider has no such kernel"
        assert seqlens_k.dtype == total.dtype == np.int32
        batch, tokens, _ = q.shape
        new_k, new_v = (x.reshape(batch, tokens, kv_num_heads, -1).transpose(0, 2, 1, 3) for x in (k, v))
        keys, values = past_key.copy(), past_value.copy()
        past_B = seqlens_k.astype(np.int64) + 1 - tokens
        for row, past in enumerate(past_B):
            keys[row, :, past : past + tokens] = new_k[row]
            values[row, :, past : past + tokens] = new_v[row]
        assert total == past_B.max() + tokens
        queries = q.reshape(batch, tokens, num_heads, -1).transpose(0, 2, 1, 3)
        new_B = np.full(batch, tokens)
        (out,) = reference_ops.SoftmaxAttention._run(self, queries, keys, values, past_B, new_B, scale=scale)
        return out.transpose(0, 2, 1, 3).reshape(q.shape), keys, values


OPS = [reference_ops.MatMul, reference_ops.RMSNormalization, FusedMatMul, LinearAttention, MoE, GroupQueryAttention]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ragged_prefill_and_continuation_equal_pytorch(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(num_local_experts=2)  # of two: no tie that rounding decides
    truth, theirs = Torch(config, "float32"), Torch(config, dtype)
    graph = lower_for_cuda(canonical(config, dtype, theirs.model))
    assert without_kernel(graph) == []
    monkeypatch.setattr(lowered_graph, "NEW_OPS", OPS)
    ours = Evaluated.of(graph, batch=2)
    random = np.random.default_rng(1)
    logits: list[list[np.ndarray]] = [[], [], []]
    for new in STEPS:
        ids = random.integers(0, config.vocab_size, (2, max(new)))
        valid = np.arange(max(new)) < np.array(new)[:, None]
        for kept, who in zip(logits, (truth, theirs, ours), strict=True):
            kept.append(who.step(ids, new)[valid])
    wanted, torch_logits, our_logits = (np.concatenate(kept) for kept in logits)
    assert relative_rms(our_logits, wanted) < RATIO * relative_rms(torch_logits, wanted)
    assert_states_as_near(ours, theirs, truth)
