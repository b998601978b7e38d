"""The rounding that is part of the model (facts, 2 and 4.4): numbers of the graph in fp32, and in 16-bit models what is rounded
where. Bit for bit, against the same steps written out in numpy.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from model_defs import ops
from model_defs.constants import decay_slopes, rotary_frequencies
from model_defs.errors import ConfigError
from model_defs.presets import preset
from model_defs.text_model import Weight

BF16 = ml_dtypes.bfloat16


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def array(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(BF16) if x.dtype == torch.bfloat16 else x.numpy()


@pytest.mark.parametrize(
    ("layer", "first", "last"), [(0, 0.917013, 0.003906), (40, 0.4527, 0.001928), (78, 0.011617, 4.9485e-5)]
)
def test_slopes_of_text_01_are_those_of_the_fact_sheet(layer: int, first: float, last: float):
    """And bit for bit an fp32 tensor times a Python number, as the original multiplies them."""
    slopes_H = decay_slopes(preset("text-01"), layer)
    assert slopes_H[[0, -1]] == pytest.approx([first, last], rel=3e-4)
    base = torch.tensor([2 ** (-8 * (head + 1) / 64) for head in range(64)], dtype=torch.float32)
    assert slopes_H.tolist() == (base * (1 - layer / 79 + 1e-5)).tolist()


def test_slopes_of_shallow_models():
    """The last of two layers hardly fades; one alone fades as a first layer does."""
    tiny = preset("tiny")

    def first_head(layers: int, layer: int) -> float:
        shallow = dataclasses.replace(tiny, layer_kinds=("lightning",) * layers, slope_layers=layers)
        return float(decay_slopes(shallow, layer)[0])

    assert first_head(2, 1) == pytest.approx(0.25e-5)
    assert first_head(2, 0) == first_head(1, 0) == pytest.approx(0.25 * (1 + 1e-5))
    with pytest.raises(ConfigError, match="power of two"):
        decay_slopes(dataclasses.replace(tiny, num_attention_heads=6), 0)


@pytest.mark.parametrize(("rotary_dim", "theta"), [(64, 1e7), (64, 1e4), (128, 1e7), (32, 1e6)])
def test_frequencies_are_the_originals_bits(rotary_dim: int, theta: float):
    """fp32 exponents, an fp32 power, its inverse: the last bit is an angle at position one million. Torch's own power may round
    otherwise by one bit on another processor.
    """
    exponents = [float(np.float32(i) / np.float32(rotary_dim)) for i in range(0, rotary_dim, 2)]
    expected = [float(np.float32(1) / np.float32(math.pow(theta, exponent))) for exponent in exponents]
    found = rotary_frequencies(rotary_dim, theta)
    assert found.dtype == np.float32
    assert found.tolist() == expected
    torchs = 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim))
    np.testing.assert_array_max_ulp(found, torchs.numpy(), maxulp=2)


def test_rotary_angles_are_fp32_products():
    positions, frequencies = np.array([[0, 3, 999_999]]), rotary_frequencies(64, 1e7)
    found = ops.rotary_angles(torch.from_numpy(positions), frequencies.tolist())
    assert np.array_equal(found.numpy(), positions[..., None].astype(np.float32) * frequencies)


def test_the_norm_rounds_before_its_weight_multiplies():
    x, weight, eps = bf16(5, 96), bf16(96, seed=1), 1e-5
    wide = array(x).astype(np.float32)
    mean = torch.from_numpy(wide).square().mean(-1, keepdim=True)  # torch's order of the sum
    normed = wide * torch.rsqrt(mean + eps).numpy()
    expected = array(weight) * normed.astype(BF16)
    assert (array(ops.rms_norm(x, weight, eps)) == expected).all()
    early = (array(weight).astype(np.float32) * normed).astype(BF16)
    assert (expected != early).any()  # the other order is another number


def test_a_norm_of_small_values_does_not_lose_them_to_16_bits():
    x = torch.full((1, 64), 2.0**-13, dtype=torch.float16)  # its square is 0 in fp16
    found = ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-12)
    assert found[0, 0] == pytest.approx(1, abs=1e-3)


def test_the_residual_rounds_both_products_and_the_sum():
    normed, branch, alpha, beta = bf16(7, 33), bf16(7, 33, seed=1), 3.5565588200778455, 0.7
    products = [
        (array(x).astype(np.float32) * np.float32(f)).astype(BF16) for x, f in ((normed, alpha), (branch, beta))
    ]
    expected = products[0] + products[1]
    assert (array(ops.scaled_residual(normed, branch, alpha, beta)) == expected).all()
    rounded = array(normed) * BF16(alpha) + array(branch) * BF16(beta)
    assert (expected != rounded).mean() > 0.1  # a factor of 16 bits is another number


def test_the_router_and_lm_head_multiply_in_fp32():
    layer, x = Weight(8, 64, dtype=torch.bfloat16), bf16(3, 64)
    layer.weight.data = bf16(8, 64, seed=1)
    found = layer.linear_wide(x)
    assert found.dtype == torch.float32
    expected = array(x).astype(np.float64) @ array(layer.weight.data).astype(np.float64).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)
    assert np.abs(layer.linear(x).float().numpy() - expected).max() > 1e-3


def test_softmax_of_16_bit_scores_is_wide():
    """1,024 keys of equal score: each weight is 2^-10, so values are averaged; sums of 16 bits would stop at 256."""
    query, keys = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), bf16(1, 1, 1024, 8)
    values = torch.ones(1, 1, 1024, 8, dtype=torch.bfloat16)
    found = ops.softmax_attention(query, keys, values, torch.tensor([1023]))
    assert found.dtype == torch.bfloat16
    assert (found == 1).all()
    # The scaled scores are not rounded: each value lays open one key's weight.
    query, keys = 4 * bf16(1, 1, 1, 32), bf16(1, 1, 32, 32, seed=1)
    values = torch.eye(32, dtype=torch.bfloat16)[None, None]
    scores = (query[0, 0] @ keys[0, 0].T).float() * 32**-0.5  # rounded as the product gives them
    found = ops.softmax_attention(query, keys, values, torch.tensor([31]))
    assert (found[0, 0] == scores.softmax(-1).bfloat16()).all()


def test_experts_weights_are_the_share_of_the_chosen_ones():
    """Softmax over all, cut to the chosen, divided by their sum, then rounded to the activations' type."""
    router = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    fc1 = torch.ones(4, 2, 1, dtype=torch.bfloat16)
    fc2 = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16)[:, None, None]
    x = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    inner = torch.nn.functional.silu(torch.ones(1, dtype=torch.bfloat16))
    share = torch.softmax(router[0, [1, 2]], -1).bfloat16()
    expected = inner * 2 * share[0] + inner * 4 * share[1]
    assert ops.mixture_of_experts(x, router, fc1, fc2, 2).flatten() == expected
    assert ops.mixture_of_experts(x, router, fc1, fc2, 1).flatten() == inner * 2
