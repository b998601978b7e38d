"""Attention of one segment's queries over a cache into which a whole chunk was written: against a loop over queries."""

from __future__ import annotations

import numpy as np
import pytest
from test_ort_lowering import operators, parse, run

from engines.onnxruntime.lowering import LowerAttention, LowerContextAttention, LowerOpset

# C queries of a segment that begins `shift` tokens behind the start of a chunk of T tokens, which is written at `past`.
SEGMENT = """g (float[B,4,C,8] q, float[B,2,T,8] k, float[B,2,T,8] v, float[B,2,S,8] pk, float[B,2,S,8] pv, int64[B] past,
    int64[1] shift) => (float[B,4,C,8] y, float[B,2,S,8] nk, float[B,2,S,8] nv) {{
  nk = TensorScatter<axis = 2>(pk, k, past)
  nv = TensorScatter<axis = 2>(pv, v, past)
  begin = Add(past, shift)
  c = Shape<start = 2, end = 3>(q)
  total = Add(begin, c)
  y = Attention<{attributes}>(q, nk, nv, , , , total)
}}"""


def loop(q, keys, values, past, shift) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Query i of row b sees keys 0 .. past[b] + shift + i; fp64."""
    out = np.zeros(q.shape)
    for b, head, i in np.ndindex(q.shape[:3]):
        seen = slice(0, past[b] + shift + i + 1)
        scores = keys[b, head // 2, seen].astype(float) @ q[b, head, i] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        out[b, head, i] = weights / weights.sum() @ values[b, head // 2, seen]
    return out


@pytest.mark.parametrize("opset", [24, 27])
@pytest.mark.parametrize(
    ("past", "chunk", "segment", "index"),
    [([0], 6, 3, 0), ([0], 6, 3, 1), ([0, 0], 4, 1, 3), ([5, 0, 11], 8, 2, 1), ([12, 3], 8, 2, 3)],
)
def test_only_slots_in_use_are_looked_at(past: list[int], chunk: int, segment: int, index: int, opset: int) -> None:
    random, batch, capacity = np.random.default_rng(0), len(past), 20
    sizes = {"q": (4, segment), "k": (2, chunk), "v": (2, chunk), "pk": (2, capacity), "pv": (2, capacity)}
    feeds = {n: random.standard_normal((batch, *s, 8), dtype=np.float32) for n, s in sizes.items()}
    end = max(past) + chunk
    feeds["pk"][:, :, end:] = feeds["pv"][:, :, end:] = np.nan  # behind the longest row: never read
    feeds |= {"past": np.array(past), "shift": np.array([index * segment])}
    windows = ", left_window_size = -1, right_window_size = -1" if opset == 27 else ""
    model = parse(SEGMENT.format(attributes="is_causal = 1" + windows), opset)
    assert not LowerAttention()(model).modified
    assert LowerContextAttention()(model).modified
    LowerOpset()(model)
    assert operators(model).count("Attention") == 1
    found, keys, values = run(model, feeds)
    for row, start in enumerate(past):
        assert np.array_equal(keys[row, :, start : start + chunk], feeds["k"][row])
    assert np.abs(found - loop(feeds["q"], keys, values, past, index * segment)).max() < 1e-5


def test_attention_that_means_something_else_is_refused() -> None:
    for attributes, words in (("is_causal = 0", "is_causal"), ("is_causal = 1, softcap = 1.0", "softcap")):
        with pytest.raises(Exception, match=words):
            LowerContextAttention()(parse(SEGMENT.format(attributes=attributes)))
