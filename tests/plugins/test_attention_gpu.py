"""Softmax attention with lengths on a GPU, through the C interface, against fp64.

Bound (fixed before any run): 4e-3 relative RMS for bf16 (weights and result rounded, 1.7e-3 each), 6e-4 for fp16.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from plugins.library import AttentionParams, Library, dtype_code  # noqa: E402

pytestmark = pytest.mark.gpu

BOUND = {"bfloat16": 4e-3, "float16": 6e-4}


def expected(q, k, v, past: list[int], new: list[int]):
    out = torch.zeros_like(q, dtype=torch.float64)
    share = q.shape[1] // k.shape[1]
    for b, (before, fresh) in enumerate(zip(past, new, strict=True)):
        if fresh == 0:
            continue
        keys = k[b, :, : before + fresh].double().repeat_interleave(share, 0)
        values = v[b, :, : before + fresh].double().repeat_interleave(share, 0)
        scores = q[b, :, :fresh].double() @ keys.mT * q.shape[-1] ** -0.5
        position = before + torch.arange(fresh, device=q.device)
        hidden = torch.arange(before + fresh, device=q.device)[None, :] > position[:, None]
        out[b, :, :fresh] = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values
    return out


def check(
    library: Library, dtype: str, heads: int, kv_heads: int, tokens: int, capacity: int, head_dim: int, past, new
):
    torch.manual_seed(tokens)
    element = getattr(torch, dtype)
    batch = len(past)
    q = torch.randn(batch, heads, tokens, head_dim, device="cuda").to(element)
    k, v = (torch.randn(batch, kv_heads, capacity, head_dim, device="cuda").to(element) for _ in range(2))
    for b in range(batch):  # garbage that nothing may read
        k[b, :, past[b] + new[b] :] = float("nan")
        v[b, :, past[b] + new[b] :] = float("nan")
        q[b, :, new[b] :] = float("nan")
    want = expected(q, k, v, past, new)
    lengths = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (past, new)]
    workspace = torch.empty(library.attention_workspace_bytes(head_dim), dtype=torch.uint8, device="cuda")
    outs = []
    for _ in range(3):
        out = torch.full_like(q, float("nan"))
        pointers = dict(
            zip(("q", "k", "v", "out", "past_lengths", "new_lengths"), (q, k, v, out, *lengths), strict=True)
        )
        params = AttentionParams(
            **{name: tensor.data_ptr() for name, tensor in pointers.items()},
            **dict(batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, capacity=capacity, head_dim=head_dim),
            **dict(dtype=dtype_code(dtype), scale=head_dim**-0.5),
            **dict(workspace=workspace.data_ptr(), workspace_bytes=workspace.numel()),
        )
        library.softmax_attention(params, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    error = (outs[0].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error.item() <= BOUND[dtype]


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_against_fp64(kernel_library: Library, dtype: str, head_dim: int, tokens: int) -> None:
    past, new = [0, 1000, 4096 - tokens, 77], [tokens, tokens, tokens, tokens // 2]
    check(kernel_library, dtype, 64, 8, tokens, 4096, head_dim, past, new)


def test_long_cache(kernel_library: Library) -> None:
    check(kernel_library, "bfloat16", 64, 8, 1, 131072, 128, [131071], [1])


def test_attention_memory_clean(kernel_library: Library) -> None:
    check(kernel_library, "bfloat16", 4, 2, 5, 200, 64, [130, 0], [5, 3])
