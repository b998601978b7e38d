"""Messages whose content has parts: texts and images, as MiniMax-VL-01's chat template puts them together.

It writes the parts of a message one after the other, an image as its mark (reference/minimax01-facts.md, section 6). Images come as
`data:` URLs only: a server that fetched what a client names could be sent to any address that it can reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mxcompile.errors import MxcompileError
from mxcompile.image_prompts import MARK
from mxcompile.serving.images import check_amount, from_base64
from mxcompile.serving.requests import RequestError

TYPES = ("image/png", "image/jpeg", "image/webp")
_DATA = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,15}(?=:)", re.IGNORECASE)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages with text instead of parts, where `<image>` stands for an image, and all images in base64, in order.

    Raises MxcompileError that names the part.
    """
    found: list[dict[str, Any]] = []
    images: list[str] = []
    size = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) or not isinstance(content, Sequence):
            found.append(dict(message))  # what is wrong with it is said where the chat is written
            continue
        texts = []
        for at, part in enumerate(content):
            where = f"messages.{index}.content.{at}"
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
                continue
            if kind != "image_url":
                raise MxcompileError(f"{where}: must be a text or an image_url; this model reads nothing else")
            if message.get("role") != "user":
                raise MxcompileError(f"{where}: only messages of the user may have images")
            encoded = _image(f"{where}.image_url", part.get("image_url"))
            size += len(encoded) * 3 // 4
            images.append(encoded)
            texts.append(MARK)
        found.append({**message, "content": "".join(texts)})
    try:
        check_amount(len(images), size)
    except RequestError as error:
        raise MxcompileError(str(error).replace("images: ", "messages: images: ", 1)) from None
    return found, images


def refuse_images(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises MxcompileError when there is one, for an engine that takes none."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for at, part in enumerate(content if isinstance(content, Sequence) else ()):
            if isinstance(part, Mapping) and part.get("type") in ("image_url", "input_image"):
                where = f"messages.{index}.content.{at}"
                raise MxcompileError(f"{where}: this engine takes no images; it reads text only")


def _image(where: str, image: Any) -> str:
    """The base64 of one image's file."""
    if not isinstance(image, Mapping) or not isinstance(image.get("url"), str):
        raise MxcompileError(f'{where}: must be {{"url": "data:image/png;base64,..."}}')
    unknown = sorted(set(image) - {"url", "detail"})
    if unknown:
        raise MxcompileError(f"{where}.{unknown[0]}: not supported here")
    if image.get("detail") not in (None, "auto", "high"):
        raise MxcompileError(
            f'{where}.detail: only "auto" and "high" are supported: this model looks at every image in full; make the image smaller '
            "for it to take fewer tokens"
        )
    url: str = image["url"]
    head = _DATA.match(url)
    if head is None:
        scheme = _SCHEME.match(url)
        what = f"{scheme.group().lower()}: URLs are not followed" if scheme else "this is no URL"
        raise MxcompileError(
            f"{where}.url: {what}; this server fetches nothing: send the image itself, as data:image/png;base64,..."
        )
    if head.group(1).strip().lower() not in (*TYPES, "image/jpg"):
        raise MxcompileError(f"{where}.url: must be one of {', '.join(TYPES)}")
    if head.group(2).split(";")[-1].strip().lower() != "base64":
        raise MxcompileError(f"{where}.url: must hold base64: data:{head.group(1)};base64,...")
    encoded = url[head.end() :]
    try:
        if not from_base64(f"{where}.url", encoded):
            raise MxcompileError(f"{where}.url: the image is empty")
    except RequestError as error:
        raise MxcompileError(str(error)) from None
    return encoded
