"""What `preprocessor_config.json` says about pixels: how tiles are normalised (facts, section 5).

Sizes and resolutions stand in config.json too; a file that contradicts it, or asks for a step that this family does not have, is
refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_defs.errors import ConfigError
from model_defs.strict_json import parse_object
from model_defs.vision_config import VisionConfig

PREPROCESSOR_FILE = "preprocessor_config.json"
_MAX_BYTES = 1_000_000
_BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class ImageProcessing:
    """A channel's value v in 0 .. 1 becomes (v - mean) / std; red, green, blue."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PUBLISHED_PROCESSING = ImageProcessing(
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


def processor_to_json(processing: ImageProcessing, vision: VisionConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [list(pair) for pair in vision.grid_pinpoints],
        "image_mean": list(processing.mean),
        "image_std": list(processing.std),
        "patch_size": vision.patch_size,
        "process_image_mode": "anyres",
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": vision.image_size, "width": vision.image_size},
    }


def read_processing(folder: Path, vision: VisionConfig) -> ImageProcessing:
    """The normalisation of the checkpoint in `folder`; the published one when it has no such file.

    Raises ConfigError where the file cannot be understood or contradicts `vision`.
    """
    path = folder / PREPROCESSOR_FILE
    if not path.exists():
        return PUBLISHED_PROCESSING
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: is too large for a configuration")
        values = parse_object(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be understood: {error}") from None
    expected = processor_to_json(PUBLISHED_PROCESSING, vision) | {"do_center_crop": False}
    del expected["image_mean"], expected["image_std"], expected["rescale_factor"]
    for key, value in expected.items():
        if values.get(key) is not None and values[key] != value:
            raise ConfigError(
                f"{path}: {key} {_short(values[key])} is not supported; config.json asks for {_short(value)}"
            )
    scale = values.get("rescale_factor", 1 / 255)
    if not isinstance(scale, float) or abs(scale * 255 - 1) > 1e-6:
        raise ConfigError(f"{path}: rescale_factor {_short(scale)} is not supported; it must be 1 / 255")
    mean = _three(path, "image_mean", values.get("image_mean", list(PUBLISHED_PROCESSING.mean)))
    std = _three(path, "image_std", values.get("image_std", list(PUBLISHED_PROCESSING.std)))
    if min(std) <= 0:
        raise ConfigError(f"{path}: image_std must be positive, not {_short(list(std))}")
    return ImageProcessing(mean, std)


def _three(path: Path, key: str, value: Any) -> tuple[float, float, float]:
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(v) in (int, float) and abs(v) < 1e3 for v in value)
    ):
        raise ConfigError(f"{path}: {key} must be three numbers, not {_short(value)}")
    return float(value[0]), float(value[1]), float(value[2])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
