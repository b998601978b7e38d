"""How far an engine may be from the PyTorch definition: every limit, per engine dtype, with its reason.

They were set before anything was measured and are not to be widened to make an engine pass.

Two ways of judging:

- Exact types (float32, float64): the largest error of all positions must keep the limit. Top-2 routing makes this delicate: where the
  last chosen and the first left-out expert are nearer than rounding, either choice is right and leads to different numbers. The rule,
  applied to each row: if the first position over the limit is one where the reference's own router has such a near-tie, the
  row is called rerouted, the tie is named (layer, position, margin), and the row is compared up to that position only; the states of
  layers up to the tie's stay under judgement. An error that starts anywhere else counts. A check left with less than half of
  its positions is inconclusive, not passed.
- Rounded types (bfloat16, float16): so many tokens meet a near-tie that rerouting cannot be set aside. The median error keeps the limit,
  and next tokens must agree as stated.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.config import EngineConfig
from mxcompile.errors import MxcompileError

LOGIT_SCALE = 6.0
"""The logits limits hold at this scale (mean over positions of the largest |logit|) and grow in proportion to the reference's."""

TOP_K = 5


@dataclass(frozen=True)
class Limit:
    """A measured value must be at most `value` (at least, for shares of agreement)."""

    value: float
    reason: str


@dataclass(frozen=True)
class Thresholds:
    """The limits of one engine dtype."""

    dtype: str
    exact: bool  # judge the largest error, not the median
    logits: Limit  # |difference| of a logit, at LOGIT_SCALE
    kl: Limit  # KL(reference || engine) of a position, nats, at LOGIT_SCALE
    states: (
        Limit  # recurrent state per head, and cached keys and values per position: |difference| / |reference|, norms
    )
    hidden: Limit  # residual stream behind a layer, per token, relative as above
    router: Limit  # |difference| of a router logit
    router_tie: Limit  # margin of the reference's router below which either expert is right
    stable_margin: (
        Limit  # reference's margin between first and second token from which on the first must agree; at LOGIT_SCALE
    )
    stable_top1: Limit  # share of stable positions whose first token agrees, at least
    unstable_topk: Limit  # share of the other positions whose first token is among the engine's TOP_K, at least

    def limits(self) -> dict[str, Limit]:
        """All limits by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Limit)}


FLOAT32 = Thresholds(
    dtype="float32",
    exact=True,
    logits=Limit(2e-4, "what two fp32 programs that add in different orders may differ by; 3e-5 of the logit scale"),
    kl=Limit(2e-8, "bounded by the logits limit e: a change of every logit by at most e changes KL by at most e^2 / 2"),
    states=Limit(1e-4, "sums of up to a thousand fp32 products, each 1e-6 off after some layers, with room for depth"),
    hidden=Limit(1e-4, "as the states, which are linear in it; a wrong formula shows from 1e-3 on"),
    router=Limit(
        1e-4, "the logits limit brought to router logits, whose spread (1.5) and number (8 to 32) are smaller"
    ),
    router_tie=Limit(2e-4, "two router logits may each move by the router limit"),
    stable_margin=Limit(4e-4, "two logits may each move by the logits limit"),
    stable_top1=Limit(1.0, "beyond the stable margin the first token cannot change"),
    unstable_topk=Limit(1.0, "logits within 2e-4 of each other: the first token may become second, never sixth"),
)

FLOAT64 = Thresholds(
    dtype="float64",
    exact=True,
    logits=Limit(
        2e-6, "sessions give logits out as fp32, half a unit in the last place of 8 is 2.4e-7; both sides round"
    ),
    kl=Limit(2e-12, "the square of the logits limit over two"),
    states=Limit(1e-6, "states are given out as fp32: 6e-8 relative each"),
    hidden=Limit(1e-6, "taps are given out as fp32: 6e-8 relative each"),
    router=Limit(2e-6, "as the logits"),
    router_tie=Limit(1e-9, "inside, routers compute in fp64: 1e-13 apart, with room"),
    stable_margin=Limit(4e-6, "two logits may each move by the logits limit"),
    stable_top1=Limit(1.0, "beyond the stable margin the first token cannot change"),
    unstable_topk=Limit(1.0, "the first token may become second, never sixth"),
)

BFLOAT16 = Thresholds(
    dtype="bfloat16",
    exact=False,
    logits=Limit(
        0.5, "0.2 % per rounding, ten a layer, random over 80 layers: 3 % of a spread of 2, the largest of 200,000"
    ),
    kl=Limit(
        0.05, "KL is about half the variance of the logits' errors: 0.06 at 3 % of a spread, plus rerouted tokens"
    ),
    states=Limit(
        0.2, "3 % from rounding; tokens that go to another expert change their own keys and values by a quarter"
    ),
    hidden=Limit(0.1, "3 % from rounding over 80 layers, with room for rerouted tokens below the median"),
    router=Limit(0.15, "the hidden limit times a spread of 1.5"),
    router_tie=Limit(0.3, "two router logits may each move by the router limit"),
    stable_margin=Limit(1.0, "two logits may each move by the logits limit"),
    stable_top1=Limit(0.95, "rerouted tokens, about one in six of eight layers, may move the first token even then"),
    unstable_topk=Limit(0.9, "as above"),
)

FLOAT16 = Thresholds(
    dtype="float16",
    exact=False,
    logits=Limit(0.0625, "an eighth of bfloat16's: three more bits of mantissa"),
    kl=Limit(0.005, "a tenth of bfloat16's: its square would be a sixty-fourth, but rerouted tokens fall off linearly"),
    states=Limit(0.05, "a quarter of bfloat16's, for the same reason"),
    hidden=Limit(0.0125, "an eighth of bfloat16's"),
    router=Limit(0.02, "an eighth of bfloat16's"),
    router_tie=Limit(0.04, "two router logits may each move by the router limit"),
    stable_margin=Limit(0.125, "two logits may each move by the logits limit"),
    stable_top1=Limit(0.97, "rerouted tokens are an eighth as many as in bfloat16"),
    unstable_topk=Limit(0.95, "as above"),
)

THRESHOLDS = {limits.dtype: limits for limits in (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)}


def thresholds_for(engine: EngineConfig) -> Thresholds:
    """The limits that apply to an engine. Raises MxcompileError when none were set for its kind."""
    if engine.quantization is not None:
        raise MxcompileError(
            f"no limits are set for engines quantized as {engine.quantization!r}; validate an engine without quantization"
        )
    if engine.dtype not in THRESHOLDS:
        raise MxcompileError(f"no limits are set for engines of dtype {engine.dtype!r}; known: {', '.join(THRESHOLDS)}")
    return THRESHOLDS[engine.dtype]
