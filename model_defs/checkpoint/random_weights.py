"""Random weights that make a model of this family behave like a trained one, as far as numerics are concerned.

With plain small weights every logit is near zero, experts are tied and attention is uniform: two programs then agree
however wrong one of them is. Here every part has a visible effect on the logits:

- A matrix has standard deviation c / sqrt(fan_in), so that an input of unit size gives an output of size c, at any
width. Norms make
  the input of every projection of unit size. The constants c are below, each with its reason.
- A sub-layer adds about 1 to a residual of alpha (2 in eight layers, 3.56 in eighty), so neither drowns the other at
any depth. - Norm weights differ from 1 and from each other, so that a swapped or forgotten norm shows.

Every tensor has its own random stream, keyed by the seed and its name: the same values come out whatever the order, the
sharding or the schema.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from statistics import NormalDist

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from model_defs.checkpoint.names import layer_of
from model_defs.checkpoint.random_vision import is_vision, vision_spread
from model_defs.config import ModelConfig
from model_defs.constants import decay_slopes

# Largest |logit| of a position, mean over positions: the scale that tolerances of this project are stated at.
LOGIT_SCALE = 6.0

# Output size c of each projection for an input of unit size.
PROJECTION_SIZE = {
    # Of the three parts of qkv_proj. SiLU of a normal variable of size 2 is mostly positive, so the products q k of a
    # head are too: a head's output is then seldom a small difference of large terms, which the norm behind it would
    # blow up together with its rounding errors (size 1 lost a digit at first tokens). Values of size 0.6 have mean near
    # zero, so heads still differ by token.
    "query": 2.0,
    "key": 2.0,
    "value": 0.6,
    "output_gate": 1.5,  # sigmoid between 0.1 and 0.9: gates that are neither stuck nor all one half
    "out_proj": 1.8,  # gated normed heads have size 0.55, so the sub-layer adds about 1
    "q_proj": 1.4,  # attention scores q k / sqrt(d) of spread 1.4 * 1.4 = 2: some keys matter, none takes all
    "k_proj": 1.4,
    "v_proj": 1.0,
    "o_proj": 2.0,  # averaging over keys shrinks values to about one half
    "gate": 1.5,  # router logits of spread 1.5: a clear ranking, and the second expert's share is seldom negligible
    "w1": 1.0,
    "w3": 1.0,
    "w2": 2.2,  # SiLU(w1 x) * (w3 x) has size 0.6, and mixing two experts leaves about 0.75 of it
}
NORM_JITTER = 0.1
# The size of a trained embedding; also small enough for the first norm's eps of 1e-5 to count (2.5 % of the mean
# square).
EMBEDDING_SIZE = 0.02
# Tokens of context at which lightning heads of all decays contribute alike (see `_head_gain`).
REFERENCE_CONTEXT = 256

_BLOCK_ELEMENTS = 4 << 20
NUMPY_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def random_blocks(
    config: ModelConfig, name: str, shape: tuple[int, ...], *, seed: int, dtype: str
) -> Iterator[NDArray]:
    """Values of tensor `name` in consecutive row blocks of at most some 4 million elements, of type `dtype`."""
    plain = name.removeprefix(config.tensor_prefix)
    digest = hashlib.sha256(f"{seed}/{plain}".encode()).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    if is_vision(plain):
        mean, size = vision_spread(plain, shape)
        scale = np.full(shape[0], size, np.float32)
    else:
        is_norm = len(shape) == 1
        mean = 1.0 if is_norm else 0.0
        scale = np.full(shape[0], NORM_JITTER, np.float32) if is_norm else _row_scales(config, plain, shape)
    columns = math.prod(shape[1:])
    rows_per_block = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, shape[0], rows_per_block):
        rows = min(rows_per_block, shape[0] - first)
        block = stream.standard_normal((rows, *shape[1:]), dtype=np.float32)
        block *= scale[first : first + rows].reshape(-1, *(1,) * (len(shape) - 1))
        if mean:
            block += np.float32(mean)
        yield block.astype(NUMPY_DTYPES[dtype])


def expected_largest(count: int) -> float:
    """Mean of the largest |z| among `count` standard normal variables, to about 1 %."""
    return NormalDist().inv_cdf(1 - math.exp(-0.5772) / (2 * count))


def _row_scales(config: ModelConfig, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard deviation of each row of a matrix."""
    part = re.sub(r"\.weight$", "", name).rsplit(".", 1)[-1]
    if part == "embed_tokens":
        return np.full(shape[0], EMBEDDING_SIZE, np.float32)
    if part == "lm_head":
        size = LOGIT_SCALE / expected_largest(config.vocab_size)
        return np.full(shape[0], size / math.sqrt(shape[1]), np.float32)
    if part == "qkv_proj":
        sizes = [PROJECTION_SIZE[kind] for kind in ("query", "key", "value")]
        by_head = np.empty((config.num_attention_heads, 3, config.head_dim), np.float32)
        by_head[:] = np.asarray(sizes)[:, None] / math.sqrt(shape[1])
        by_head[:, 0] *= _head_gain(config, name)[:, None]
        return by_head.reshape(-1)
    return np.full(shape[0], PROJECTION_SIZE[part] / math.sqrt(shape[1]), np.float32)


def _head_gain(config: ModelConfig, name: str) -> NDArray[np.float32]:
    """What the queries of each head are scaled by, so that one norm over all heads does not leave only the longest
    memories.

    A head that forgets at rate s sums about G = (1 - e^(-s n)) / (1 - e^(-s)) tokens of a context of n. Terms add up
    between like sqrt(G) and like G, so G^-0.3 evens out most of it at long contexts, and leaves slow heads a voice at
    the first tokens.
    """
    layer = layer_of(name)
    if layer is None:
        raise ValueError(f"{name} is not a tensor of a layer")
    slopes = np.asarray(decay_slopes(config, layer), np.float64)
    summed = -np.expm1(-slopes * REFERENCE_CONTEXT) / -np.expm1(-slopes)
    return (summed**-0.3).astype(np.float32)
