"""A model that writes anything: what comes out is the constraint's doing alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.generation import GenerationConfig
from engines.generation.generate import Row
from model_defs.checkpoint.random_tokenizer import write_tokenizer
from model_defs.presets import preset
from mxcompile.tokenizer import Tokenizer


def tiny_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of preset tiny, written into `folder`: 512 tokens, 510 ends a sequence."""
    write_tokenizer(preset("tiny"), folder)
    found = Tokenizer.find(folder)
    assert found is not None
    return found


def written(compiler, tokenizer, guide, seed, *, size, most=400, begin=(), haste=0.0, **settings):
    """The result of a model of random logits under a guide. It wants to `begin` with these tokens, and then to end with so much `haste`."""
    config = GenerationConfig(max_new_tokens=most, constraint=compiler.compile(guide), seed=seed, **settings)
    row, random = Row(0, [1], config, size, tokenizer.detokenizer()), np.random.default_rng(seed)
    row.limit = most
    wanted = list(begin)
    while row.finish_reason is None:
        logits_N = 3 * random.normal(size=size)
        if wanted:
            logits_N[wanted.pop(0)] += 1000
        logits_N[list(config.stop_token_ids)] += haste
        row.step(logits_N)
    return row.result(0.0)
