"""What guides cost on a vocabulary of the published size: making it, compiling a guide, and the mask of each step.

    python benchmarks/guides.py [--json FILE]

The vocabulary is made up: 200,064 tokens of letters, digits, signs and Chinese characters, byte-level. Needs no engine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import numpy as np

from mxcompile.guides import Guide
from mxcompile.guides.compiler import GuideCompiler

SIZE = 200_064
STEPS = 200
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "friends": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GUIDES = {
    "any JSON object": Guide("json"),
    "a recursive schema": Guide("json_schema", json.dumps(PERSON)),
    "10,000 choices": Guide("choice", json.dumps([f"answer {i * 7919 % 10_007} of {i}" for i in range(10_000)])),
    "an expression": Guide("regex", r"([A-Z][a-z]{2,9} ){1,8}[0-9]{4}-[0-9]{2}"),
    "a grammar": Guide("grammar", 'start: expr\nexpr: term (("+" | "-") term)*\nterm: /[0-9]+/ | "(" expr ")"'),
}


class Vocabulary:
    """What a guide's compiler asks of a tokenizer."""

    special: frozenset[int] = frozenset()
    byte_level = True

    def __init__(self) -> None:
        draw, tokens = random.Random(0), [bytes([byte]) for byte in range(256)]
        known = set(tokens)
        while len(tokens) < SIZE:
            token = self._token(draw)
            if token not in known:
                known.add(token)
                tokens.append(token)
        self._tokens = tokens

    def token_bytes(self, token: int) -> bytes:
        return self._tokens[token]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    @staticmethod
    def _token(draw: random.Random) -> bytes:
        kind = draw.random()
        if kind < 0.7:
            letters = "etaoinshrdlucmfwypvbgkjqxz"[: 8 + draw.randrange(19)]
            return (draw.choice(["", " "]) + "".join(draw.choices(letters, k=draw.randint(2, 9)))).encode()
        if kind < 0.9:
            return "".join(chr(0x4E00 + draw.randrange(20_000)) for _ in range(draw.randint(1, 3))).encode()
        return "".join(draw.choices('{}[]":,\n ()<>=.;/\\0123456789_-', k=draw.randint(2, 7))).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="Also write the numbers there.")
    arguments = parser.parse_args()
    compiler = GuideCompiler(Vocabulary(), SIZE)  # type: ignore[arg-type]
    began = time.perf_counter()
    compiler.prepare()
    numbers: dict[str, object] = {"vocabulary_s": time.perf_counter() - began}
    compiler.compile(Guide("regex", "a"))  # starts the trial process
    print(f"vocabulary of {SIZE} tokens: {numbers['vocabulary_s']:.2f} s, once for a server")
    print(f"{'guide':20} {'compile ms':>10} {'mask ms: median':>16} {'p99':>8} {'most':>8} {'steps':>6}")
    for name, guide in GUIDES.items():
        numbers[name] = row = measure(compiler, guide)
        print(
            f"{name:20} {row['compile_ms']:10.1f} {row['median_ms']:16.3f} {row['p99_ms']:8.3f} {row['most_ms']:8.3f} {row['steps']:6}"
        )
    compiler.close()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(numbers, file, indent=1)


def measure(compiler: GuideCompiler, guide: Guide) -> dict[str, float]:
    """Milliseconds of compiling and of masks, along answers of random tokens."""
    began = time.perf_counter()
    make = compiler.compile(guide)
    compile_ms = (time.perf_counter() - began) * 1000
    draw, follower, masks_ms = np.random.default_rng(0), make(), []
    while len(masks_ms) < STEPS:
        began = time.perf_counter()
        allowed_N, _ = follower.allowed()
        masks_ms.append((time.perf_counter() - began) * 1000)
        ids = np.flatnonzero(allowed_N)
        if len(ids):
            follower.accept(int(draw.choice(ids)))
        else:
            follower = make()
    ordered = sorted(masks_ms)
    return {
        "compile_ms": compile_ms,
        "median_ms": statistics.median(masks_ms),
        "p99_ms": ordered[int(0.99 * len(ordered))],
        "most_ms": ordered[-1],
        "steps": len(masks_ms),
    }


if __name__ == "__main__":
    main()
