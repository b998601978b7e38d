"""The OpenAI endpoints as an ASGI application over Triton's generate endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from mxcompile.errors import MxcompileError
from mxcompile.serving.openai.bodies import ChatBody, Common, CompletionBody

LARGEST_BODY = 16 << 20  # bytes
_KINDS = {400: "invalid_request_error", 404: "invalid_request_error", 413: "invalid_request_error"}
_STATUS = {"unavailable": 503, "internal": 500, "cancelled": 499}
Shape = Callable[[str, str | None, bool], dict[str, Any]]  # text, finish reason, streamed -> one choice


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def create_app(triton: str, metrics: str, model: str) -> FastAPI:
    """`triton`: base address of its HTTP port; `metrics`: address of its metrics; `model`: name of the one model."""
    started = int(time.time())
    client = httpx.AsyncClient(base_url=triton, timeout=None, limits=httpx.Limits(max_connections=None))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="mxcompile", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(_error(error.status, error.message), error.status)

    @app.exception_handler(MxcompileError)
    async def input_error(request: Request, error: MxcompileError) -> JSONResponse:
        return JSONResponse(_error(400, str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def body_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        known = first["type"] == "extra_forbidden"
        message = f"{where}: not supported here" if known else f"{where or 'body'}: {first['msg']}"
        return JSONResponse(_error(400, message), 400)

    @app.exception_handler(httpx.TransportError)
    async def no_triton(request: Request, error: httpx.TransportError) -> JSONResponse:
        return JSONResponse(_error(503, "the engine server cannot be reached; try again in a moment"), 503)

    @app.middleware("http")
    async def limit_body(request: Request, answer: Any) -> Response:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and (not length.isdigit() or int(length) > LARGEST_BODY):
            status = 413 if length.isdigit() else 411
            message = f"a request must say the length of its body, and that may be {LARGEST_BODY} bytes at most"
            return JSONResponse(_error(status, message), status)
        found: Response = await answer(request)
        return found

    @app.get("/health/live")
    async def live() -> PlainTextResponse:
        return PlainTextResponse("live\n")

    @app.get("/health/ready")
    async def ready() -> PlainTextResponse:
        found = await client.get(f"/v2/models/{model}/ready", timeout=5)
        return PlainTextResponse("ready\n" if found.status_code == 200 else "not ready\n", found.status_code)

    @app.get("/metrics")
    async def read_metrics() -> PlainTextResponse:
        return PlainTextResponse((await client.get(metrics, timeout=5)).text)

    card = {"id": model, "object": "model", "created": started, "owned_by": "mxcompile"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name)
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await answer(body, request, "chat.completion", _chat_choice)

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        return await answer(body, request, "text_completion", _text_choice)

    def _check_model(name: str) -> None:
        if name != model:
            raise ApiError(404, f"there is no model {name!r}; this server has {model!r}")

    async def answer(body: Common, request: Request, kind: str, shape: Shape) -> Response:
        _check_model(body.model)
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        tensors = body.tensors() | {"stream": body.stream}
        if not body.stream:
            found = await _unless_left(request, client.post(f"/v2/models/{model}/generate", json=tensors))
            values = _values(found.status_code, found.text)
            choice = shape(values["text_output"], values["finish_reason"], False)
            return JSONResponse(head | {"object": kind, "choices": [choice], "usage": _usage(values)})
        sent = client.build_request("POST", f"/v2/models/{model}/generate_stream", json=tensors)
        stream = await client.send(sent, stream=True)
        if stream.status_code != 200:
            text = (await stream.aread()).decode(errors="replace")
            await stream.aclose()
            raise _refusal(stream.status_code, text)
        head["object"] = "chat.completion.chunk" if kind == "chat.completion" else kind
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_chunks(stream, head, shape, wants_usage), media_type="text/event-stream")

    return app


async def _chunks(stream: httpx.Response, head: dict[str, Any], shape: Shape, wants_usage: bool) -> AsyncIterator[str]:
    """Triton's events as the API's; leaving early closes the connection, which cancels the request."""
    try:
        if head["object"] == "chat.completion.chunk":
            opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield _event(head | {"choices": [opening]})
        async for line in stream.aiter_lines():
            _acknowledge(stream)
            if not line.startswith("data:"):
                continue
            values = json.loads(line[5:])
            if "error" in values:
                refusal = _refusal(500, line)
                yield _event(_error(refusal.status, refusal.message))
                return
            finish = values.get("finish_reason")
            if values["text_output"] or finish:
                yield _event(head | {"choices": [shape(values["text_output"], finish, True)]})
            if finish and wants_usage:
                yield _event(head | {"choices": [], "usage": _usage(values)})
        yield "data: [DONE]\n\n"
    except httpx.TransportError:
        yield _event(_error(503, "the engine server ended; try again in a moment"))
    finally:
        await stream.aclose()


def _acknowledge(stream: httpx.Response) -> None:
    """Acknowledge what came at once. Triton leaves Nagle's algorithm on, which holds the next token back until then;
    the system would wait 40 ms. It forgets this option, so it is set each time.
    """
    receiver = stream.extensions["network_stream"].get_extra_info("socket")
    if hasattr(socket, "TCP_QUICKACK"):  # Linux
        receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


async def _unless_left(request: Request, work: Any) -> httpx.Response:
    """The response to `work`, which is given up when the client leaves: Triton then sees its connection close."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        found: httpx.Response = task.result()
        return found
    finally:
        task.cancel()
        gone.cancel()


def _values(status: int, text: str) -> dict[str, Any]:
    if status != 200:
        raise _refusal(status, text)
    values: dict[str, Any] = json.loads(text)
    if "error" in values:
        raise _refusal(500, text)
    return values


def _refusal(status: int, text: str) -> ApiError:
    """The error in one of Triton's error bodies, with the status that its kind has (see triton/model.py: fail)."""
    try:
        message = str(json.loads(text.removeprefix("data:").strip())["error"])
    except (ValueError, KeyError, TypeError):
        return ApiError(status, text.strip()[:500] or "the engine server gave no reason")
    kind, _, rest = message.partition(": ")
    return ApiError(_STATUS[kind], rest) if kind in _STATUS else ApiError(status, message)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _usage(values: dict[str, Any]) -> dict[str, Any]:
    asked, made = values["num_input_tokens"], values["num_output_tokens"]
    details = {"cached_tokens": min(values["num_cached_tokens"], asked)}
    return {
        "prompt_tokens": asked,
        "completion_tokens": made,
        "total_tokens": asked + made,
        "prompt_tokens_details": details,
    }


def _chat_choice(text: str, finish: str | None, streamed: bool) -> dict[str, Any]:
    if streamed:
        return {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}


def _text_choice(text: str, finish: str | None, streamed: bool) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
