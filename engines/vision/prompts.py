"""The places of images in a prompt: one mark for each image, which becomes as many tokens as the image has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engines.errors import EngineError


class Sized(Protocol):
    """What is known of an image before its features are."""

    @property
    def tokens(self) -> int: ...


def expand(ids: Sequence[int], images: Sequence[Sized], mark: int, prompt: int = 0) -> list[int]:
    """`ids` with the i-th token `mark` repeated as often as the i-th image has tokens.

    Raises EngineError when there are not as many marks as images; `prompt` is the prompt's number in the message.
    """
    check_marks(ids, len(images), mark, prompt)
    sizes = iter(image.tokens for image in images)
    return [copy for token in ids for copy in [token] * (next(sizes) if token == mark else 1)]


def starts(ids: Sequence[int], images: Sequence[Sized], mark: int) -> list[int]:
    """Where each image begins in what `expand` makes of `ids`."""
    found, before = [], 0
    sizes = iter(image.tokens for image in images)
    for token in ids:
        if token == mark:
            found.append(before)
        before += next(sizes) if token == mark else 1
    return found


def check_marks(ids: Sequence[int], images: int, mark: int, prompt: int = 0) -> None:
    """Raises EngineError unless `ids` have as many tokens `mark` as there are images."""
    marks = sum(token == mark for token in ids)
    if marks != images:
        raise EngineError(
            f"prompt {prompt} has {_count(marks, '<image> mark')} for {_count(images, 'image')}; write <image> once where "
            "each image belongs"
        )


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
