"""Images of a request before any pixel is decoded: what a client sent, checked, and its places in the prompt.

Only the head of a file is read here; `image_process` decodes, and only what no known state spares.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from engines.config import VisionHalf
from engines.errors import ENVIRONMENT, EngineError
from engines.vision.layout import Size, token_rows
from engines.vision.pixels import measure
from engines.vision.prompts import expand, starts
from mxcompile.image_prompts import MARK
from mxcompile.serving.requests import FailureKind, RequestError

MOST_IMAGES = 16
"""Images of one request."""
MOST_BYTES = 16 << 20
"""Bytes of all image files of one request; how many pixels one may have is `engines.vision.pixels.MAX_PIXELS`."""
NO_VISION = "this engine takes no images: it has no vision half; build one from a MiniMax-VL-01 checkpoint for onnxruntime, on one rank"


@dataclass(frozen=True)
class PromptImage:
    """An image file and the places `start` to `end` of a prompt's tokens that it takes. `digest` tells it from every other image:
    of the file's bytes, and of how this engine cuts images.
    """

    name: str
    data: bytes
    size: Size
    tokens: int
    digest: bytes
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.tokens

    def behind(self, tokens: int) -> PromptImage:
        """The same where so many tokens come first."""
        return replace(self, start=self.start + tokens)


def place_images(
    prompt: str | Sequence[int], ids: list[int], files: Sequence[bytes], vision: VisionHalf | None
) -> tuple[list[int], tuple[PromptImage, ...]]:
    """The prompt's ids with every mark repeated for the tokens of its image, and the images.

    Raises RequestError for images that this engine does not take, that are too many or too large, are no PNG, JPEG or WebP files, or
    do not fit the marks in the prompt. A damaged file may pass until it is decoded.
    """
    if not files and not (vision is not None and isinstance(prompt, str) and MARK in prompt):
        return ids, ()
    if vision is None:
        raise RequestError(NO_VISION)
    check_amount(len(files), sum(len(data) for data in files))
    try:
        images = [_looked_at(f"images.{index}", data, vision) for index, data in enumerate(files)]
        expanded = expand(ids, images, vision.image_token_id)
    except EngineError as error:
        kind: FailureKind = "internal" if error.exit_code == ENVIRONMENT else "invalid"
        raise RequestError(str(error).replace("prompt 0", "the prompt"), kind) from error
    places = starts(ids, images, vision.image_token_id)
    return expanded, tuple(image.behind(start) for image, start in zip(images, places, strict=True))


def check_amount(images: int, size: int) -> None:
    """Raises RequestError when one request may not have so many images, or `size` bytes of them."""
    if images > MOST_IMAGES:
        raise RequestError(f"images: {images} were given; a request may have {MOST_IMAGES} at most")
    if size > MOST_BYTES:
        raise RequestError(
            f"images: the files have {size} bytes together; those of a request may have {MOST_BYTES} at most ({MOST_BYTES >> 20} MiB)"
        )


def from_base64(name: str, text: str) -> bytes:
    """Bytes out of base64, whose line breaks do not matter. Raises RequestError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name}: is not valid base64 ({error}); it may have been cut off") from None


def _looked_at(name: str, data: bytes, vision: VisionHalf) -> PromptImage:
    size = measure(data, vision, name)
    cut = json.dumps(asdict(vision), sort_keys=True).encode()
    digest = hashlib.sha256(hashlib.sha256(cut).digest() + data).digest()
    return PromptImage(name, data, size, len(token_rows(size, vision)), digest)
