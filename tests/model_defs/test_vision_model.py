"""The vision half against CLIP as transformers has it, a projector in NumPy, and a packing written cell by cell."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_defs import anyres
from model_defs.checkpoint.create import create_checkpoint
from model_defs.presets import preset
from mxcompile.backends.vision import load_vision

SMALL, PUBLISHED = preset("tiny-vl"), preset("vl-01").vision
assert SMALL.vision is not None
assert PUBLISHED is not None
# Tokens of images of this height and width in the published model (reference, section 5).
KNOWN_COUNTS = {
    (336, 336): 1176,
    (480, 640): 2340,
    (1000, 1000): 5832,
    (768, 1024): 7560,
    (1080, 1920): 9864,
    (1920, 1080): 9920,
    (3000, 3000): 9888,
    (2016, 1008): 11088,
}


def checkpoint(folder, **vision: object):
    config = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, **vision))
    return create_checkpoint(config, folder / "vl", seed=2, dtype="float32")


def clip(opened, dtype=torch.float64):
    """transformers' CLIP with the checkpoint's tower (its eager attention rounds to fp32). Its norm behind the last layer has no part in
    what is compared.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    vision = opened.config.vision
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act"
    wanted = {key: getattr(vision, key) for key in [*sizes.split(), "layer_norm_eps"]}
    model = CLIPVisionModel(CLIPVisionConfig(**wanted, attn_implementation="sdpa")).to(dtype).eval()
    tower = "vision_tower.vision_model."
    own = {n.removeprefix(tower): n for n in opened.entries if n.startswith(tower)}
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    values = {prefix + name: torch.from_numpy(opened.array(full).copy()).to(dtype) for name, full in own.items()}
    missing = model.load_state_dict(values, strict=False)
    assert not missing.unexpected_keys
    assert all("post_layernorm" in name for name in missing.missing_keys)
    return model


@pytest.mark.parametrize(
    "vision", [{}, {"hidden_act": "quick_gelu"}, {"feature_layer": -2}, {"feature_layer": 0}, {"layer_norm_eps": 1e-2}]
)
def test_tower_is_clips(tmp_path, vision: dict):
    """In fp64 both do the same sums, so only their order differs."""
    opened = checkpoint(tmp_path, **vision)
    side = opened.config.vision.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, side, side)))
    with torch.no_grad():
        hidden = clip(opened)(pixels, output_hidden_states=True).hidden_states
        mine = load_vision(opened, "float64").vision_tower["vision_model"](pixels)
    expected = hidden[opened.config.vision.feature_layer][:, 1:]
    assert 0.5 < expected.std() < 10
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)


def test_rows_are_the_projected_patches_and_the_newline(tmp_path):
    opened = checkpoint(tmp_path)
    vision, model = opened.config.vision, load_vision(opened, "float64")
    pixels = np.random.default_rng(1).standard_normal((2, 3, vision.image_size, vision.image_size))
    with torch.no_grad():
        features = model.vision_tower["vision_model"](torch.from_numpy(pixels)).numpy()
        rows = model(torch.from_numpy(pixels)).numpy()

    def linear(x, part):
        read = (opened.array(f"multi_modal_projector.{part}.{kind}").astype(np.float64) for kind in ("weight", "bias"))
        weight, bias = read
        return x @ weight.T + bias

    inner = linear(features, "linear_1")
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    np.testing.assert_allclose(rows[:-1], linear(inner, "linear_2").reshape(-1, rows.shape[1]), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(rows[-1], opened.array("image_newline"))
    # An image row looks to the text model as a token's embedding does.
    assert 0.01 < rows[:-1].std() < 0.05


def test_fp32_is_near_fp64(tmp_path):
    opened = checkpoint(tmp_path)
    side = opened.config.vision.image_size
    pixels = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 3, side, side)).astype(np.float32))
    with torch.no_grad():
        wide, narrow = load_vision(opened, "float64")(pixels.double()), load_vision(opened)(pixels)
    assert float((narrow - wide).norm() / wide.norm()) < 1e-5  # some ten fp32 sums of up to 150 terms in a row


# --- Tiles and tokens ------------------------------------------------------------------------------------------------


def cell_by_cell(size, vision) -> list[int]:
    """Which row of the model's output each token takes, found by walking over all cells of the map: tiles lie row by row, an image's
    cells are those within the middle part that has its proportions, in whole cells rounded as the released code does.
    """
    height, width = size
    pinpoint = max(
        vision.grid_pinpoints,
        key=lambda p: (
            min(
                int(width * min(p[1] / width, p[0] / height)) * int(height * min(p[1] / width, p[0] / height)),
                height * width,
            ),
            -p[0] * p[1],
        ),
    )
    side, per = vision.patches_per_side, vision.patches
    columns, rows = pinpoint[1] // vision.patch_size, pinpoint[0] // vision.patch_size
    top = left = 0
    if width * rows > columns * height:
        top = (rows - (height * columns) // width) // 2
    else:
        left = (columns - (width * rows) // height) // 2
    tiles_across = columns // side
    newline = per * (1 + tiles_across * (rows // side))
    tokens = list(range(per))
    for y in range(rows):
        if not top <= y < rows - top:
            continue
        for x in range(columns):
            if left <= x < columns - left:
                tile = 1 + (y // side) * tiles_across + x // side
                tokens.append(tile * per + (y % side) * side + x % side)
        tokens.append(newline)
    return tokens


@pytest.mark.parametrize(("size", "count"), KNOWN_COUNTS.items())
def test_known_token_counts(size, count: int):
    assert anyres.image_tokens(size, PUBLISHED) == count
    assert len(cell_by_cell(size, PUBLISHED)) == count


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_grid_is_transformers_and_of_either_reading(height: int, width: int):
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    mine = anyres.tile_grid((height, width), PUBLISHED)
    theirs = get_anyres_image_grid_shape(
        (height, width), [list(p) for p in PUBLISHED.grid_pinpoints], PUBLISHED.image_size
    )
    assert mine == tuple(theirs)
    # The released processor reads sizes and resolutions as width, height; a closed list of resolutions gives the same number of tiles.
    turned = anyres.tile_grid((width, height), PUBLISHED)
    assert anyres.image_tokens((height, width), PUBLISHED) == len(cell_by_cell((height, width), PUBLISHED))
    assert math.prod(turned) == math.prod(mine)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300))
def test_packing_cell_by_cell(height: int, width: int):
    from model_defs.vision_model import VisionModel

    vision = SMALL.vision
    with torch.device("meta"):
        model = VisionModel(vision, 1)
    grid = anyres.tile_grid((height, width), vision)
    count = (1 + grid[0] * grid[1]) * vision.patches + 1
    packed = model.pack(torch.arange(count, dtype=torch.float64)[:, None], (height, width))
    assert packed[:, 0].tolist() == cell_by_cell((height, width), vision)
    assert len(packed) == anyres.image_tokens((height, width), vision)


def test_packing_refuses_another_number_of_tiles():
    from model_defs.vision_model import VisionModel

    with torch.device("meta"):
        model = VisionModel(SMALL.vision, 1)
    with pytest.raises(ValueError, match="not 3 in all"):
        model.pack(torch.zeros(3 * SMALL.vision.patches + 1, 1), (28, 28))
