"""Pictures to ask about, and what they look like on the wire."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise, so that no two look alike to a model."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_head(width: int, height: int, rest: bytes = b"") -> bytes:
    """The beginning of a PNG file that says to be so large, with correct checksums, and nothing (or `rest`) behind it."""

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rest or zlib.compress(b"\0" * 64))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64_of(data)}"


def part(data: bytes, kind: str = "image/png", **more: object) -> dict:
    """An image as part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(data, kind), **more}}
