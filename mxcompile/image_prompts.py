"""Prompts about images: `<image>` marks in a text, and the images for them, checked against each other and made ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engines.config import EngineConfig
from mxcompile.errors import MxcompileError

if TYPE_CHECKING:
    from engines.vision.pixels import PreparedImage

MARK = "<image>"
ImageSource = Any  # a path, the bytes of a PNG, JPEG or WebP file, or a PIL.Image.Image


def with_images(
    config: EngineConfig,
    prompts: Sequence[str | Sequence[int]],
    ids: list[list[int]],
    images: Sequence[Sequence[ImageSource]] | None,
) -> tuple[list[list[int]], list[list[PreparedImage]] | None]:
    """The prompts' token ids with every mark repeated for the tokens of its image, and the images read and tiled.

    Nothing changes for an engine without a vision half, nor for token lists when no images are given: their ids may be of an
    earlier answer. Raises MxcompileError when images are given that the engine does not take or for other prompts, EngineError when
    marks and images of a prompt differ in number or an image cannot be read.
    """
    vision = config.vision
    if vision is None:
        if images is None or not any(images):
            return ids, None
        raise MxcompileError(
            "this engine has no vision half and takes no images; build one from a MiniMax-VL-01 checkpoint for onnxruntime, on one rank"
        )
    if images is None:
        if not any(isinstance(prompt, str) and MARK in prompt for prompt in prompts):
            return ids, None
        images = [[] for _ in prompts]
    if len(images) != len(ids):
        raise MxcompileError(f"images were given for {len(images)} prompts, but there are {len(ids)}")

    from engines.vision.pixels import prepare
    from engines.vision.prompts import check_marks, expand

    for index, (prompt_ids, shown) in enumerate(zip(ids, images, strict=True)):
        check_marks(prompt_ids, len(shown), vision.image_token_id, index)  # before any file is read
    prepared = [[prepare(source, vision) for source in shown] for shown in images]
    return [
        expand(row, shown, vision.image_token_id, i) for i, (row, shown) in enumerate(zip(ids, prepared, strict=True))
    ], prepared


def marked(text: str, images: int) -> str:
    """A user's message about images: as it is where it holds marks, else with a mark for each image in front, as the chat template
    puts the images of a message that come first.
    """
    return text if MARK in text else MARK * images + text
