"""The mixture of experts on a GPU for tests and benchmarks: torch tensors in, the C interface underneath, an fp64 oracle.

Legend: N tokens, D hidden, E experts, I inner, k experts per token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from plugins.library import Library, MoeParams, dtype_code

PATHS = ("stream", "grouped64", "grouped128", "sm90")


@dataclass
class Inputs:
    """One call's device tensors. Weights are [E, 2I, D] (gate and up rows interleaved) and [E, D, I]."""

    x: torch.Tensor
    logits: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    fc1_scale: torch.Tensor | None = None
    fc2_scale: torch.Tensor | None = None
    top_k: int = 2
    normalize: bool = True

    def local(self, first: int, count: int) -> Inputs:
        """The same call on a rank that holds the experts first .. first + count - 1."""
        part = slice(first, first + count)
        scales = [None if scale is None else scale[part] for scale in (self.fc1_scale, self.fc2_scale)]
        return Inputs(self.x, self.logits, self.fc1[part], self.fc2[part], *scales, self.top_k, self.normalize)


def make_weights(
    experts: int,
    hidden: int,
    inner: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    int8: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(fc1, fc2, fc1_scale, fc2_scale), random, scaled so that outputs are near 1; made expert by expert to save memory."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def one(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = torch.empty(experts, rows, columns, dtype=torch.int8 if int8 else dtype, device="cuda")
        scales = torch.empty(experts, rows, dtype=scale_dtype, device="cuda") if int8 else None
        for expert in range(experts):
            values = torch.randn(rows, columns, generator=generator, device="cuda") * (1.5 / columns**0.5)
            if scales is None:
                weights[expert] = values.to(dtype)
            else:
                scales[expert] = (values.abs().amax(-1) / 127).to(scale_dtype)
                weights[expert] = (values / scales[expert].float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        return weights, scales

    fc1, fc1_scale = one(2 * inner, hidden)
    fc2, fc2_scale = one(hidden, inner)
    return fc1, fc2, fc1_scale, fc2_scale


def make_tokens(
    tokens: int,
    hidden: int,
    experts: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    router_dtype: torch.dtype = torch.float32,
    skew: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [N, D], logits [N, E]). Expert e is favoured by a logit of -skew * log(1 + e)."""
    generator = torch.Generator("cuda").manual_seed(1000 + seed)
    x = torch.randn(tokens, hidden, generator=generator, device="cuda").to(dtype)
    bias = skew * torch.log1p(torch.arange(experts, device="cuda", dtype=torch.float32))
    logits = torch.randn(tokens, experts, generator=generator, device="cuda") - bias
    return x, logits.to(router_dtype)


def make_inputs(
    tokens: int,
    hidden: int = 512,
    inner: int = 768,
    experts: int = 32,
    top_k: int = 2,
    *,
    dtype: torch.dtype = torch.bfloat16,
    int8: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    router_dtype: torch.dtype = torch.float32,
    normalize: bool = True,
    skew: float = 0.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs on the current GPU."""
    x, logits = make_tokens(tokens, hidden, experts, dtype=dtype, router_dtype=router_dtype, skew=skew, seed=seed)
    weights = make_weights(experts, hidden, inner, dtype=dtype, int8=int8, scale_dtype=scale_dtype, seed=seed)
    return Inputs(x, logits, *weights, top_k, normalize)


@contextmanager
def forced(path: str | None) -> Iterator[None]:
    """Within, the library takes this path (None: as planned)."""
    before = os.environ.pop("MXC_MOE_PATH", None)
    if path is not None:
        os.environ["MXC_MOE_PATH"] = path
    try:
        yield
    finally:
        os.environ.pop("MXC_MOE_PATH", None)
        if before is not None:
            os.environ["MXC_MOE_PATH"] = before


def params_of(inputs: Inputs, out: torch.Tensor, first: int = 0) -> MoeParams:
    """The launch's parameters, without a workspace. `inputs.fc1` holds the experts from `first` on."""

    def pointer(x: torch.Tensor | None) -> int:
        assert x is None or (x.is_cuda and x.is_contiguous())
        return 0 if x is None else x.data_ptr()

    return MoeParams(
        x=pointer(inputs.x),
        router_logits=pointer(inputs.logits),
        fc1=pointer(inputs.fc1),
        fc2=pointer(inputs.fc2),
        fc1_scale=pointer(inputs.fc1_scale),
        fc2_scale=pointer(inputs.fc2_scale),
        out=pointer(out),
        router_dtype=dtype_code(str(inputs.logits.dtype)),
        scale_dtype=dtype_code(str(inputs.fc1_scale.dtype)) if inputs.fc1_scale is not None else 0,
        dtype=dtype_code(str(inputs.x.dtype)),
        weight_dtype=dtype_code(str(inputs.fc1.dtype)),
        tokens=inputs.x.shape[0],
        hidden=inputs.x.shape[1],
        inner=inputs.fc2.shape[2],
        experts=inputs.logits.shape[1],
        top_k=inputs.top_k,
        first_local=first,
        local_experts=len(inputs.fc1),
        normalize=int(inputs.normalize),
    )


def run(library: Library, inputs: Inputs, path: str | None = None, *, first: int = 0) -> torch.Tensor:
    """[N, D]. Output and workspace start as NaN."""
    out = torch.full_like(inputs.x, float("nan"))
    with forced(path):
        params = params_of(inputs, out, first)
        needed = library.moe_workspace_bytes(params)
        workspace = torch.full((needed,), 255, dtype=torch.uint8, device="cuda")
        params.workspace, params.workspace_bytes = workspace.data_ptr(), needed
        library.moe(params, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return out


def route(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, k] experts, [N, k] fp64 weights); equal logits go to the lowest expert."""
    values, chosen = inputs.logits.double().sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)[:, : inputs.top_k]
    if inputs.normalize:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return chosen[:, : inputs.top_k], probabilities


def reference(inputs: Inputs, first: int = 0, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """fp64 [N, D] (or the rows `tokens` of it) over the experts held, one after the other."""
    chosen, weights = route(inputs)
    x = inputs.x
    if tokens is not None:
        chosen, weights, x = chosen[tokens], weights[tokens], x[tokens]
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for held in range(len(inputs.fc1)):
        token, choice = (chosen == first + held).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        fc1, fc2 = inputs.fc1[held].double(), inputs.fc2[held].double()
        if inputs.fc1_scale is not None and inputs.fc2_scale is not None:
            fc1, fc2 = fc1 * inputs.fc1_scale[held].double()[:, None], fc2 * inputs.fc2_scale[held].double()[:, None]
        both = x[token].double() @ fc1.T
        rows = (torch.nn.functional.silu(both[:, 0::2]) * both[:, 1::2]) @ fc2.T
        out.index_add_(0, token, rows * weights[token, choice][:, None])
    return out


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over the RMS of `want`; inf where anything is not finite."""
    difference = got.double() - want
    if not torch.isfinite(difference).all():
        return float("inf")
    return float(difference.square().sum().sqrt() / want.square().sum().sqrt().clamp_min(1e-300)) if len(want) else 0.0
