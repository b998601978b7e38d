"""Lightning attention on a GPU for tests and benchmarks: torch tensors in, the C interface underneath, fp64 oracles.

Shapes: B sequences, T tokens, H heads, K = V = head_dim, P state slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning_reference import slopes as model_slopes

from plugins.library import Library, LightningParams, LightningPlan, dtype_code

CHUNK = 64


@dataclass
class Inputs:
    """One call's device tensors; state is the pool [P, H, K, V]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    state: torch.Tensor
    slopes: torch.Tensor | None = None
    log_decay: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    scale: float = 1.0


def make_inputs(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int = 128,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layer: int = 40,
    per_token: bool = False,
    lengths: list[int] | None = None,
    slots: list[int] | None = None,
    pool: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs on the current GPU. Rows past a length are NaN: nothing may read them."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def pad(x: torch.Tensor) -> torch.Tensor:
        for b, length in enumerate(lengths or []):
            x[b, length:] = float("nan")
        return x

    decay = torch.from_numpy(model_slopes(layer, heads)).cuda()
    log_decay = None
    if per_token:
        log_decay = pad(-decay * 2 * torch.rand(batch, tokens, heads, generator=generator, device="cuda"))
    q, k, v = (pad(normal(batch, tokens, heads, head_dim).to(dtype)) for _ in range(3))

    def ints(values: list[int] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device="cuda")

    state = normal(pool or batch, heads, head_dim, head_dim) * 3
    return Inputs(q, k, v, state, None if per_token else decay, log_decay, ints(lengths), ints(slots), scale)


def params_of(
    inputs: Inputs, out: torch.Tensor, state_in: torch.Tensor | None, state_out: torch.Tensor
) -> LightningParams:
    """The launch's parameters, without a workspace."""

    def pointer(x: torch.Tensor | None) -> int:
        assert x is None or (x.is_cuda and x.is_contiguous())
        return 0 if x is None else x.data_ptr()

    batch, tokens, heads, head_dim = inputs.q.shape
    return LightningParams(
        q=pointer(inputs.q),
        k=pointer(inputs.k),
        v=pointer(inputs.v),
        out=pointer(out),
        state_in=pointer(state_in),
        state_out=pointer(state_out),
        slots=pointer(inputs.slots),
        log_decay=pointer(inputs.log_decay),
        slopes=pointer(inputs.slopes),
        lengths=pointer(inputs.lengths),
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        pool_slots=len(state_out),
        dtype=dtype_code(str(inputs.q.dtype)),
        scale=inputs.scale,
    )


def device_plan(library: Library, inputs: Inputs) -> LightningPlan:
    """The planner's choice for these shapes on the current GPU."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    batch, tokens, heads, head_dim = inputs.q.shape
    return library.plan_prefill(
        batch, tokens, heads, head_dim, facts.multi_processor_count, 10 * facts.major + facts.minor
    )


def run(
    library: Library, inputs: Inputs, plan: LightningPlan | None = None, *, decode: bool = False, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and the state pool afterwards. Outputs, workspace and (not in place) the output pool start as NaN."""
    out = torch.full_like(inputs.q, float("nan"))
    state_out = inputs.state.clone() if in_place else torch.full_like(inputs.state, float("nan"))
    params = params_of(inputs, out, state_out if in_place else inputs.state, state_out)
    stream = torch.cuda.current_stream().cuda_stream
    if decode:
        library.lightning_decode(params, stream)
    else:
        plan = plan or device_plan(library, inputs)
        needed = library.lightning_workspace_bytes(plan, params.batch, params.heads, params.head_dim)
        workspace = torch.full((needed,), 255, dtype=torch.uint8, device="cuda")
        params.workspace, params.workspace_bytes = workspace.data_ptr(), needed
        library.lightning_prefill(params, plan, stream)
    torch.cuda.synchronize()
    return out, state_out


def reference(inputs: Inputs, chunk: int = CHUNK) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 outputs [B, T, H, V] and state pool. chunk=1 is the token-by-token recurrence."""
    batch, tokens, heads, _ = inputs.q.shape
    out = torch.zeros_like(inputs.q, dtype=torch.float64)
    states = inputs.state.double()
    for b in range(batch):
        slot = b if inputs.slots is None else int(inputs.slots[b])
        if not 0 <= slot < len(states):
            continue
        length = tokens if inputs.lengths is None else int(inputs.lengths[b])
        q, k, v = (x[b, :length].double().transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))  # [H, T, K]
        if inputs.log_decay is None:
            g = (-inputs.slopes.double())[:, None].expand(heads, length)
        else:
            g = inputs.log_decay[b, :length].double().T
        state = states[slot]
        for begin in range(0, length, chunk):
            part = slice(begin, min(begin + chunk, length))
            total = g[:, part].cumsum(1)
            between = (total[:, :, None] - total[:, None, :]).tril().exp().tril()
            inside = (q[:, part] @ k[:, part].transpose(1, 2) * between) @ v[:, part]
            before = total.exp()[:, :, None] * (q[:, part] @ state)
            out[b, part] = (inside + before).transpose(0, 1) * inputs.scale
            kept = (total[:, -1:] - total).exp()[:, :, None]
            state = total[:, -1].exp()[:, None, None] * state + (k[:, part] * kept).transpose(1, 2) @ v[:, part]
        states[slot] = state
    return out, states


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference over the RMS of `want`; inf where anything is not finite."""
    difference = got.double() - want.double()
    if not torch.isfinite(difference).all():
        return float("inf")
    return float(difference.square().mean().sqrt() / want.double().square().mean().sqrt().clamp_min(1e-30))
