"""How far an engine may be from the PyTorch definition: every limit, per engine dtype, with its reason.

The fp32 limits on logits and states are what the project promises and were fixed first; the others follow from them by the reasons given.
None is to be widened to make an engine pass.

Two ways of judging:

- Exact types (float32, float64): the largest error of all positions must keep the limit. Top-2 routing makes this delicate: where the
  last chosen and the first left-out expert are nearer than rounding, either choice is right and leads to different numbers. The rule,
  applied to each row: if the first position over the limit is one where the reference's own router has such a near-tie, the
  row is called rerouted, the tie is named (layer, position, margin), and the row is compared up to that position only; the states of
  layers up to the tie's stay under judgement. An error that starts anywhere else counts. A check left with less than half of
  its positions is inconclusive, not passed.
- Rounded types (bfloat16, float16, and float32 with the int8 activations of an engine built with `--quantize`): so many tokens meet a
  near-tie that rerouting cannot be set aside, and what one moved token does
  to the rest depends on the weights; no fixed number is right (those first estimated from rounding alone were broken by the PyTorch
  definition itself in bfloat16). The yardstick is the PyTorch definition run in the same type: the
  engine's median error may be twice the yardstick's on a plain prompt, or on the very tokens of the check where that is more; checks
  of fewer than FEW positions, where one moved token decides, get twice the largest. A share of first tokens must reach nine tenths of
  the yardstick's, likewise here or there. The yardstick never sees the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.config import EngineConfig
from mxcompile.errors import MxcompileError
from mxcompile.quantized import int8_activations, reference_options

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
    few_logits: Limit | None = None  # for checks of few positions; None: as the others
    few_kl: Limit | None = None
    few_states: Limit | None = None

    def limits(self) -> dict[str, Limit]:
        """All limits by name, without those that are as others."""
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

EXACT = {limits.dtype: limits for limits in (FLOAT32, FLOAT64)}
ROUNDED = ("bfloat16", "float16")
FEW = 64
"""Checks of rounded types with fewer positions are held against `few_*`: a median of few is no median."""

ROUNDED_FACTOR = 2.0
SHARE_FACTOR = 0.9


@dataclass(frozen=True)
class Yardstick:
    """What the PyTorch definition in a rounded type is off from the reference on one prompt.

    Tuples are (median, largest); of logits (median, 95th percentile, largest). Logit errors are divided by the reference's logit
    scale over LOGIT_SCALE, KL by its square. `topk`: share of positions whose first token is among the TOP_K.
    """

    dtype: str
    logits: tuple[float, float, float]
    kl: tuple[float, float]
    states: tuple[float, float]
    hidden: float
    router: float
    topk: float


def rounded_thresholds(yardstick: Yardstick) -> Thresholds:
    """The limits of a rounded type."""
    who = f"the PyTorch definition in {yardstick.dtype}"

    def twice(value: float, statistic: str) -> Limit:
        return Limit(ROUNDED_FACTOR * value, f"twice the {statistic} error of {who} on the same prompt")

    return Thresholds(
        dtype=yardstick.dtype,
        exact=False,
        logits=twice(yardstick.logits[0], "median"),
        kl=twice(yardstick.kl[0], "median"),
        states=twice(yardstick.states[0], "median"),
        hidden=twice(yardstick.hidden, "median"),
        router=twice(yardstick.router, "median"),
        router_tie=twice(2 * yardstick.router, "median"),
        stable_margin=twice(yardstick.logits[1], "95th percentile of the"),
        stable_top1=Limit(
            SHARE_FACTOR, "beyond twice the 95th percentile of the error, only a few moved tokens may differ"
        ),
        unstable_topk=Limit(
            SHARE_FACTOR * yardstick.topk, f"nine tenths of what {who} reaches, here or on the same positions"
        ),
        few_logits=twice(yardstick.logits[2], "largest"),
        few_kl=twice(yardstick.kl[1], "largest"),
        few_states=twice(yardstick.states[1], "largest"),
    )


def thresholds_for(engine: EngineConfig) -> Thresholds | None:
    """The limits that apply to an engine; None for a rounded type, whose limits need a yardstick.

    Quantized weights change no limit: the reference computes with the same rounded weights. Int8 activations make the type a rounded
    one; the same engine computes in fp32 when its weights are not packed, and is then held against the limits of float32 as well.

    Raises MxcompileError when no rule was set for its kind.
    """
    reference_options(engine)  # the quantization must be one that the reference knows
    if engine.dtype not in (*EXACT, *ROUNDED):
        known = ", ".join((*EXACT, *ROUNDED))
        raise MxcompileError(f"no limits are set for engines of dtype {engine.dtype!r}; known: {known}")
    return None if int8_activations(engine) else EXACT.get(engine.dtype)
