"""What every HTTP request passes: a name, a limit on its body, and a line in the log."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

LARGEST_BODY = 16 << 20  # bytes
logger = logging.getLogger("mxcompile.serving.openai")
_NAME = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in the API's words."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Door:
    """ASGI middleware. The request's name is the client's X-Request-Id where that is usable, else a new one; it is in
    `scope["state"]["request_id"]`, in the log, and in the response's X-Request-Id.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        name = given if _NAME.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        began, status = time.monotonic(), 0

        async def named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", name.encode())]
                if status in (429, 503):
                    more.append((b"retry-after", b"1"))  # seconds; a slot may be free any moment
                message = message | {"headers": [*message["headers"], *more]}
            await send(message)

        try:
            if scope["method"] == "POST" and (refusal := _refuse(headers.get(b"content-length", ""))):
                await _answer(named, *refusal)
            else:
                await self._app(scope, receive, named)
        except Exception as error:
            logger.error(json.dumps({"event": "http_failed", "request_id": name, "error": repr(error)}))
            if status:
                raise  # the connection must be cut: an answer has begun
            await _answer(named, 500, f"the server failed on this request, which its log calls {name}")
        finally:
            if scope["method"] == "POST":
                seconds = round(time.monotonic() - began, 4)
                values = {"request_id": name, "path": scope["path"], "status": status, "total_s": seconds}
                logger.info(json.dumps({"event": "http"} | values))


def _refuse(length: str) -> tuple[int, str] | None:
    if length.isdigit() and int(length) <= LARGEST_BODY:
        return None
    message = f"a request must say the length of its body, and that may be {LARGEST_BODY} bytes at most"
    return 413 if length.isdigit() else 411, message


async def _answer(send: Any, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
