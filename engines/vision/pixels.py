"""An image file to normalised tiles, as MiniMax-VL-01's processor makes them (reference/minimax01-facts.md, section 5).

The image is brought to one of some resolutions with its proportions kept, padded with black, and cut into square tiles; before
them comes a thumbnail, the whole image as one tile, its proportions not kept. Image files are untrusted: three formats, a limit on
bytes and on pixels before anything is decoded, and any failure is one EngineError.

Legend: N tiles, C colour channels, Y X pixels of a tile.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.config import VisionHalf
from engines.errors import ENVIRONMENT, EngineError
from engines.vision.layout import Size, best_resolution, token_rows

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 26  # 8192 x 8192; 192 MiB decoded

Source = Any  # a path, the bytes of a file, or a PIL.Image.Image


@dataclass(frozen=True)
class PreparedImage:
    """An image ready for the vision graph. `rows_n`: the feature row that each of its tokens takes, int64."""

    name: str
    size: Size  # height, width of the original
    tiles_NCYX: NDArray[np.float32]
    rows_n: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """How many tokens it takes in a prompt."""
        return len(self.rows_n)


def prepare(source: Source, vision: VisionHalf, name: str | None = None) -> PreparedImage:
    """Decode and tile an image. `name`: what errors call it; default: its path.

    Raises EngineError (exit code 2) for a file that cannot be read, is none of FORMATS, damaged or too large, and with exit code 3
    where Pillow is not installed.
    """
    name, image = _decoded(source, name)
    size = image.height, image.width
    return PreparedImage(name, size, tiles(image, vision, name), token_rows(size, vision))


def measure(data: bytes, vision: VisionHalf, name: str = "image") -> Size:
    """Height and width of an image as its file's head has them, of which all follows but the pixels: nothing is decoded.

    Raises EngineError as `prepare` does, but for damage behind the head.
    """
    with _opened(_bytes_of(data)[1], name) as image:
        size = image.height, image.width
    _inner(size, best_resolution(size, vision.pinpoints), name)
    return size


def tiles(image: Image.Image, vision: VisionHalf, name: str = "image") -> NDArray[np.float32]:
    """Thumbnail and tiles of an RGB image, normalised, float32 [N, 3, tile, tile]."""
    from PIL import Image

    side = vision.tile
    size = image.height, image.width
    height, width = best_resolution(size, vision.pinpoints)
    inner = _inner(size, (height, width), name)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    thumbnail = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    grid = np.asarray(canvas).reshape(height // side, side, width // side, side, 3).swapaxes(1, 2)
    tiles_NYXC = np.concatenate([thumbnail[None], grid.reshape(-1, side, side, 3)]).astype(np.float32)
    mean, std = np.asarray(vision.mean, np.float32), np.asarray(vision.std, np.float32)
    return np.ascontiguousarray(((tiles_NYXC * np.float32(1 / 255) - mean) / std).transpose(0, 3, 1, 2))


def _inner(size: Size, resolution: Size, name: str) -> tuple[int, int]:
    """Width and height of an image of `size` (height, width) once it is brought to `resolution`, its proportions kept."""
    height, width = resolution
    wide = size[1] / size[0] > width / height
    inner = (width, int(width * size[0] / size[1])) if wide else (int(height * size[1] / size[0]), height)
    if min(inner) < 1:
        raise EngineError(
            f"{name}: an image of {size[1]} x {size[0]} pixels is too narrow; nothing of it is left once it is "
            f"brought to {width} x {height}"
        )
    return inner


def _decoded(source: Source, name: str | None) -> tuple[str, Image.Image]:
    """The image's name for errors, and its first frame as RGB, as stored: a rotation noted in the file is not applied."""
    image_type = _library().Image
    if isinstance(source, image_type):
        _check_pixels(name or "image", source)
        return name or "image", source.convert("RGB")
    path, data = _bytes_of(source)
    with _opened(data, name or path) as image:
        return name or path, image.convert("RGB")


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """A file whose head was read and whose pixels may be; whatever its decoder raises inside the block becomes one EngineError."""
    library = _library()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the library says of an image that is refused anyway, or fine
            with library.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(name, image)
                yield image
    except EngineError:
        raise
    except library.DecompressionBombError:
        raise EngineError(_too_large(name, "far more")) from None
    except library.UnidentifiedImageError:
        raise EngineError(f"{name}: is not a PNG, JPEG or WebP image") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, MemoryError and others
        raise EngineError(
            f"{name}: the image is damaged ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None


def _library() -> Any:
    """Pillow's module Image."""
    try:
        from PIL import Image
    except ImportError:
        raise EngineError(
            "reading images needs Pillow, which is not installed: pip install 'mxcompile[vision]'",
            exit_code=ENVIRONMENT,
        ) from None
    return Image


def _bytes_of(source: Source) -> tuple[str, bytes]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "image", bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name = str(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise EngineError(f"{name}: cannot be read ({os.strerror(error.errno or 0)})") from None
    else:
        raise EngineError(f"an image is given as a path, as bytes or as a PIL image, not as {type(source).__name__}")
    if len(data) > MAX_BYTES:
        raise EngineError(f"{name}: image files may have {MAX_BYTES >> 20} MiB at most; make it smaller")
    return name, data


def _check_pixels(name: str, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise EngineError(_too_large(name, f"{image.width} x {image.height}"))
    if image.width * image.height == 0:
        raise EngineError(f"{name}: the image has no pixels")


def _too_large(name: str, what: str) -> str:
    return f"{name}: has {what} pixels; images may have {MAX_PIXELS} at most (8192 x 8192), make it smaller"
