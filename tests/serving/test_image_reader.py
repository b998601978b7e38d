"""The process that decodes images: what it makes of every kind of file, and what becomes of it when it is lost."""

from __future__ import annotations

import dataclasses
import io
import queue
import random
import signal
import sys

import numpy as np
import psutil
import pytest
from pictures import base64_of, encoded, picture, png_head
from PIL import Image

from engines.vision.pixels import PreparedImage, tiles
from mxcompile.serving.image_reader import ImageReader
from mxcompile.serving.images import PromptImage, from_base64, place_images
from mxcompile.serving.requests import RequestError

LIMIT_S = 300


@pytest.fixture(scope="module")
def vision(vl_loaded):
    return vl_loaded.config.vision


@pytest.fixture(scope="module")
def reader(vision):
    made = ImageReader(vision)
    yield made
    made.close()


def looked_at(data: bytes, vision) -> PromptImage:
    mark = vision.image_token_id
    _, (image,) = place_images([mark], [mark], [data], vision)
    return image


def read(reader: ImageReader, image: PromptImage):
    done: queue.Queue[bool] = queue.Queue()
    reading = reader.read(image, lambda: done.put(True))
    assert done.get(timeout=LIMIT_S)
    return reading.outcome


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(picture(60, 40), "JPEG", exif=exif, quality=95)


def animated(kind: str) -> bytes:
    return encoded(picture(40, 30, 1), kind, save_all=True, append_images=[picture(40, 30, 2)], lossless=True)


def seen_through(mode: str) -> bytes:
    image = picture(30, 50).convert("RGBA")
    image.putalpha(picture(30, 50, 5).convert("L"))
    return encoded(image.convert(mode) if mode != "P" else image.quantize(40))


STORED = encoded(picture(60, 40), "JPEG", quality=95)
KINDS = {
    "as stored, whatever its EXIF says": (exif_rotated(), Image.open(io.BytesIO(STORED))),
    "first frame of a WebP": (animated("WEBP"), picture(40, 30, 1)),
    "first frame of a PNG": (animated("PNG"), picture(40, 30, 1)),
    "alpha dropped": (seen_through("RGBA"), None),
    "gray and alpha": (seen_through("LA"), None),
    "palette with alpha": (seen_through("P"), None),
    "palette": (encoded(picture(30, 30).quantize(40)), picture(30, 30).quantize(40).convert("RGB")),
    "CMYK": (encoded(picture(30, 30, mode="CMYK"), "JPEG"), None),
    "gray": (encoded(picture(30, 30, mode="L"), "JPEG"), None),
    "black and white": (encoded(picture(30, 30, mode="1")), picture(30, 30, mode="1").convert("RGB")),
    "16 bits": (encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30))), None),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_what_the_processor_makes_of_it(reader, vision, kind):
    """By itself where the picture is known; else as Pillow's plain conversion to RGB, the published processor's, has it."""
    data, known = KINDS[kind]
    outcome = read(reader, looked_at(data, vision))
    assert isinstance(outcome, PreparedImage), outcome
    expected = (known or Image.open(io.BytesIO(data))).convert("RGB")
    assert outcome.size == (expected.height, expected.width)
    np.testing.assert_array_equal(outcome.tiles_NCYX, tiles(expected, vision))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a PNG"),
        (b"GIF89a" + bytes(40), "is not a PNG"),
        (encoded(picture(9, 9), "TIFF"), "is not a PNG"),
        (png_head(0, 9), "."),
        (png_head(9, 0), "."),
        (png_head(2**31 - 1, 2**31 - 1), "pixels|damaged"),
        (png_head(8193, 8192), "has 8193 x 8192 pixels"),
        (png_head(10_000, 9), "too narrow"),
    ],
)
def test_heads_that_are_refused_before_anything_is_decoded(vision, data, message):
    with pytest.raises(RequestError, match=message) as refused:
        looked_at(data, vision)
    assert refused.value.kind == "invalid"
    assert str(refused.value).startswith("images.0: ")
    assert "\n" not in str(refused.value)


def test_damage_behind_the_head_is_found_when_it_is_decoded(reader, vision):
    dice, failed = random.Random(0), 0
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(picture(64, 64), kind)
        for at in range(8):
            bent = bytearray(data[: len(data) // 2] if at % 2 else data)
            for _ in range(10):
                bent[dice.randrange(60, len(bent))] = dice.randrange(256)
            try:
                outcome = read(reader, looked_at(bytes(bent), vision))
            except RequestError:
                continue  # the head shows it
            if isinstance(outcome, RequestError):
                failed += 1
                assert outcome.kind == "invalid"
                assert str(outcome).startswith("images.0: the image is damaged (")
    assert failed > 6
    bomb = looked_at(png_head(8192, 8192), vision)  # 64 million pixels of which nothing follows
    assert "damaged" in str(read(reader, bomb))


def test_a_lost_decoder_costs_one_image(reader, vision):
    image = looked_at(encoded(picture(50, 50)), vision)
    expected = read(reader, image).tiles_NCYX
    for end in (signal.SIGKILL, signal.SIGSEGV):
        reader._child.process.send_signal(end)
        reader._child.process.wait(LIMIT_S)
        np.testing.assert_array_equal(read(reader, image).tiles_NCYX, expected)  # it was at rest
        reader._child.process.send_signal(signal.SIGSTOP)
        done: queue.Queue[bool] = queue.Queue()
        lost = reader.read(image, lambda done=done: done.put(True))
        reader._child.process.send_signal(end)
        reader._child.process.send_signal(signal.SIGCONT)
        assert done.get(timeout=LIMIT_S)
        assert isinstance(lost.outcome, PreparedImage | RequestError)  # whichever was first
        np.testing.assert_array_equal(read(reader, image).tiles_NCYX, expected)


def test_an_image_that_takes_too_long_is_given_up(reader, vision, monkeypatch):
    image = looked_at(encoded(picture(50, 50)), vision)
    read(reader, image)
    reader._child.process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as short:
        short.setattr(reader, "_limit_s", 0.1)
        outcome = read(reader, image)
    assert isinstance(outcome, RequestError)
    assert (outcome.kind, str(outcome)[:45]) == ("invalid", "images.0: the image takes longer than 0.1 s; ")
    assert isinstance(read(reader, image), PreparedImage), "the next one is read by a new process"


def test_what_was_dropped_is_not_read(reader, vision):
    image = looked_at(encoded(picture(50, 50)), vision)
    read(reader, image)
    reader._child.process.send_signal(signal.SIGSTOP)
    done: queue.Queue[str] = queue.Queue()
    readings = [reader.read(image, lambda name=name: done.put(name)) for name in "abc"]
    readings[1].dropped = True
    reader._child.process.send_signal(signal.SIGCONT)
    assert [done.get(timeout=LIMIT_S), done.get(timeout=LIMIT_S)] == ["a", "c"]
    assert readings[1].outcome is None


def test_the_process_has_little_memory(reader, vision):
    """Else a file could take all of the machine's."""
    read(reader, looked_at(encoded(picture(50, 50)), vision))
    assert psutil.Process(reader._child.process.pid).rlimit(psutil.RLIMIT_AS)[0] <= 4 << 30


def test_base64_is_taken_with_line_breaks_and_not_cut_off():
    data = random.Random(1).randbytes(1000)
    text = base64_of(data)
    assert from_base64("a", "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))) == data
    for wrong in (text[:-1], text[:-2], text[1:], text.replace("A", "-"), text + "=", "Ä" + text):
        with pytest.raises(RequestError, match="a: is not valid base64"):
            from_base64("a", wrong)


def test_two_images_have_two_digests(vision):
    one, two = encoded(picture(30, 30, 1)), encoded(picture(30, 30, 2))
    cut = dataclasses.replace(vision, mean=[0.0, 0.0, 0.0])
    assert looked_at(one, vision).digest == looked_at(one, vision).digest
    assert len({looked_at(*asked).digest for asked in ((one, vision), (two, vision), (one, cut))}) == 3


def test_a_machine_without_pillow_says_what_is_missing(vision, monkeypatch):
    data = encoded(picture(9, 9))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RequestError, match=r"reading images needs Pillow.*mxcompile\[vision\]") as refused:
        looked_at(data, vision)
    assert refused.value.kind == "internal", "the server's fault, not the request's"
