"""Images to tiles and token places: against transformers' own steps, against the model's definition, and against hostile files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engines.config import EngineConfig, VisionHalf
from engines.errors import EngineError
from engines.vision import pixels
from engines.vision.layout import token_rows
from engines.vision.pixels import prepare, tiles

GRIDS = [(h, w) for h, most in enumerate((6, 6, 6, 4, 3, 3), 1) for w in range(1, most + 1)]


def half(tile: int, patches: int) -> VisionHalf:
    pinpoints = [[h * tile, w * tile] for h, w in GRIDS]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return VisionHalf("vision.onnx", "vision.weights.json", 7, tile, patches, pinpoints, mean, std)


PUBLISHED, SMALL = half(336, 24), half(28, 4)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient, so that resampling at another phase or with another filter shows."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) % 256], -1)
    noise = np.random.default_rng(seed).integers(-60, 60, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def transformers_processor(vision: VisionHalf):
    """transformers' LLaVA-NeXT processor with what MiniMax-VL-01 does otherwise: sides rounded down, no padding of the list."""
    from transformers.image_utils import SizeDict
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    class Processor(LlavaNextImageProcessorPil):
        def _resize_for_patching(self, image, target_resolution, resample):
            height, width = image.shape[-2:]
            most_height, most_width = target_resolution
            if width / height > most_width / most_height:
                wanted = int(most_width * height / width), most_width
            else:
                wanted = most_height, int(most_height * width / height)
            return self.resize(image=image, size=SizeDict(height=wanted[0], width=wanted[1]), resample=resample)

    side = {"height": vision.tile, "width": vision.tile}
    options = {"crop_size": side, "do_center_crop": False, "do_pad": False, "do_convert_rgb": True, "resample": 3}
    return Processor(
        size=side, image_grid_pinpoints=vision.pinpoints, image_mean=vision.mean, image_std=vision.std, **options
    )


@pytest.mark.parametrize("size", [(28, 28), (100, 37), (31, 200), (29, 27), (300, 301), (1, 3)])
def test_tiles_are_those_of_transformers(size):
    """Both resample with Pillow in 8 bits; what is left is fp32 rounding of the normalisation (values up to 2.7)."""
    image = picture(*size)
    theirs = transformers_processor(SMALL)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(tiles(image, SMALL), theirs, rtol=0, atol=2e-6)


def test_tiles_of_the_published_size():
    image = picture(640, 480)
    theirs = transformers_processor(PUBLISHED)(image, return_tensors="np")["pixel_values"][0]
    mine = prepare(encoded(image), PUBLISHED)
    np.testing.assert_allclose(mine.tiles_NCYX, theirs, rtol=0, atol=2e-6)
    assert (mine.size, mine.tokens, len(mine.tiles_NCYX)) == ((480, 640), 2340, 5)


def test_padding_is_black_and_in_equal_parts():
    """A white image of 28 x 20 fits one tile of 28 x 28 with 4 black rows above and below."""
    found = tiles(Image.new("RGB", (28, 20), "white"), SMALL)[1]
    black = [(0 - m) / s for m, s in zip(SMALL.mean, SMALL.std, strict=True)]
    white = [(1 - m) / s for m, s in zip(SMALL.mean, SMALL.std, strict=True)]
    for channel in range(3):
        np.testing.assert_allclose(found[channel, :4], black[channel], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[channel, 4:24], white[channel], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[channel, 24:], black[channel], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2500), st.integers(1, 2500))
def test_token_places_are_the_definitions(height: int, width: int):
    import torch

    from model_defs.anyres import tile_grid
    from model_defs.presets import preset
    from model_defs.vision_model import VisionModel

    config = preset("vl-01").vision
    with torch.device("meta"):
        model = VisionModel(dataclasses.replace(config, num_hidden_layers=1), 1)
    mine = token_rows((height, width), PUBLISHED)
    grid = tile_grid((height, width), config)
    rows = torch.arange((1 + grid[0] * grid[1]) * 576 + 1)[:, None]
    np.testing.assert_array_equal(mine, model.pack(rows, (height, width))[:, 0].numpy())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_formats_and_modes(kind: str, mode: str):
    wide = Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30))
    image = wide if mode == "I;16" else picture(30, 30).convert(mode)
    try:
        data = encoded(image, kind)
    except OSError:
        data = encoded(image.convert("RGB"), kind)  # the format has no such mode
    assert prepare(data, SMALL).tiles_NCYX.shape[1:] == (3, 28, 28)


def test_sources(tmp_path):
    image = picture(40, 30)
    (tmp_path / "a.png").write_bytes(encoded(image))
    expected = prepare(image, SMALL).tiles_NCYX
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image)):
        np.testing.assert_array_equal(prepare(source, SMALL).tiles_NCYX, expected)
    with pytest.raises(EngineError, match="as a path"):
        prepare(17, SMALL)


# --- Files that cannot be used ---------------------------------------------------------------------------------------


def refused(source, match: str, vision: VisionHalf = SMALL) -> None:
    with pytest.raises(EngineError, match=match) as caught:
        prepare(source, vision)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_and_damaged_files(kind: str):
    data = encoded(picture(64, 64), kind)
    for length in (len(data) // 2, len(data) - 40, 30):
        refused(data[:length], "image")
    dice = random.Random(0)
    for _ in range(60):
        bent = bytearray(data)
        for _ in range(20):
            bent[dice.randrange(len(bent))] = dice.randrange(256)
        with contextlib.suppress(EngineError):  # nothing else may come out; some damage does not show
            prepare(bytes(bent), SMALL)


def test_other_files_and_formats(tmp_path):
    refused(b"", "is not a PNG, JPEG or WebP image")
    refused(b"hello", "is not a PNG, JPEG or WebP image")
    refused(encoded(picture(8, 8), "GIF"), "is not a PNG, JPEG or WebP image")
    refused(encoded(picture(8, 8), "TIFF"), "is not a PNG, JPEG or WebP image")
    refused(tmp_path / "none.png", "none.png: cannot be read")
    refused(tmp_path, "cannot be read")


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")

    flat = Image.new("1", (9000, 9000))
    data = encoded(flat)
    assert len(data) < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    refused(data, "9000 x 9000 pixels")
    header = bytearray(data)
    header[16:24] = (200_000).to_bytes(4, "big") * 2  # width and height of the PNG header; its checksum no longer fits
    refused(bytes(header), "pixels|damaged|is not a PNG")


def test_large_files_and_narrow_images(monkeypatch):
    refused(picture(20_000, 10), "too narrow")
    monkeypatch.setattr(pixels, "MAX_BYTES", 100)
    refused(encoded(picture(64, 64)), "MiB at most")


def test_engine_configuration_mentions_a_vision_half_only_where_there_is_one():
    config = EngineConfig("0", "onnxruntime", {}, "float32", None, [], [], [], [])  # type: ignore[arg-type]
    assert '"vision"' not in config.to_json()
    assert '"vision"' in dataclasses.replace(config, vision=SMALL).to_json()
