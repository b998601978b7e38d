"""The OpenAI endpoints as an ASGI application over Triton's generate endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from mxcompile.errors import MxcompileError
from mxcompile.serving.openai.bodies import REASONS, ChatBody, Common, CompletionBody
from mxcompile.serving.openai.choices import ChatChoice, Choice, TextChoice, usage
from mxcompile.serving.openai.door import Door, error_body
from mxcompile.serving.openai.response_format import blamed
from mxcompile.serving.openai.triton import Answer, ApiError

CLIENT_HEADER = "x-client-id"
_LONGEST_CLIENT = 128  # characters of a client's name that count
T = TypeVar("T")


def create_app(triton: str, metrics: str, model: str, family: str = "text-01", images: bool = False) -> FastAPI:
    """`triton`: base address of its HTTP port; `metrics`: address of its metrics; `model`: name of the one model;
    `family`: which published model it is one of, which decides the chat's text; `images`: whether the engine takes any.
    """
    started = int(time.time())
    client = httpx.AsyncClient(base_url=triton, timeout=None, limits=httpx.Limits(max_connections=None))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="mxcompile", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error_body(error.status, error.message, error.param), error.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}: "
        return JSONResponse(error_body(error.status_code, where + str(error.detail)), error.status_code)

    @app.exception_handler(MxcompileError)
    async def input_error(request: Request, error: MxcompileError) -> JSONResponse:
        field, colon, _ = str(error).partition(": ")
        return JSONResponse(error_body(400, str(error), field if colon and " " not in field else None), 400)

    @app.exception_handler(RequestValidationError)
    async def body_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        unknown = first["type"] == "extra_forbidden"
        message = REASONS.get(where, "not supported here") if unknown else first["msg"]
        return JSONResponse(error_body(400, f"{where or 'body'}: {message}", where or None), 400)

    @app.exception_handler(httpx.TransportError)
    async def no_triton(request: Request, error: httpx.TransportError) -> JSONResponse:
        return JSONResponse(error_body(503, "the engine server cannot be reached; try again in a moment"), 503)

    @app.get("/health/live")
    async def live() -> PlainTextResponse:
        return PlainTextResponse("live\n")

    @app.get("/health/ready")
    async def ready() -> PlainTextResponse:
        found = await client.get(f"/v2/models/{model}/ready", timeout=5)
        if found.status_code != 200:
            return PlainTextResponse("not ready\n", 503)
        # Triton calls the model ready also while its engine process is being started again.
        numbers = (await client.get(metrics, timeout=5)).text
        up = re.search(r"^mxcompile_engine_ready\{.*\} 1", numbers, re.MULTILINE)
        return PlainTextResponse("ready\n" if up else "the engine is being started again\n", 200 if up else 503)

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
        tools = body.tool_use(family)
        return await answer(body, request, "chat.completion", lambda index: ChatChoice(index, tools))

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        return await answer(body, request, "text_completion", TextChoice)

    def _check_model(name: str) -> None:
        if name != model:
            raise ApiError(404, f"there is no model {name!r}; this server has {model!r}", "model")

    async def answer(body: Common, request: Request, kind: str, make: Callable[[int], Choice]) -> Response:
        _check_model(body.model)
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        named = {"request_id": request.state.request_id}
        if who := _client(request, body):
            named["client_id"] = who
        asked = [tensors | named for tensors in body.requests(family, images)]
        choices = [make(index) for index in range(len(asked) * body.answers)]
        try:
            answers = await _unless_left(request, _ask_all(client, model, asked))
        except ApiError as error:
            raise blamed(error, body.guide_field) from None
        merged = _merge(answers, body.answers)
        if body.stream:
            head["object"] = "chat.completion.chunk" if kind == "chat.completion" else kind
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(merged, head, choices, body.answers, wants_usage)
            return _Stream(events, answers)
        ends = await _unless_left(request, _collect(merged))
        found = [choice.whole(values) for choice, (_, values) in zip(choices, sorted(ends.items()), strict=True)]
        totals = usage(list(ends.values()), body.answers)
        return JSONResponse(head | {"object": kind, "choices": found, "usage": totals})

    return app


def _client(request: Request, body: Common) -> str:
    """Whom to be fair to: what a proxy says, else what the body says, else who has this API key."""
    key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    hashed = f"key:{hashlib.sha256(key.encode()).hexdigest()[:16]}" if key else ""
    return (request.headers.get(CLIENT_HEADER) or body.client or hashed)[:_LONGEST_CLIENT]


async def _ask_all(client: httpx.AsyncClient, model: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """Send all requests; when one is refused, the others are given up."""
    tasks = [asyncio.ensure_future(Answer.ask(client, model, tensors)) for tensors in asked]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(done, Answer):
                await done.close()
        raise


async def _merge(answers: list[Answer], each: int) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Index of the choice and outputs of each response, as they come; ending this closes all."""
    tasks: list[asyncio.Task[None]] = []
    try:
        if len(answers) == 1:
            async for values in answers[0]:
                yield values.get("choice_index", 0), values
            return
        arrived: asyncio.Queue[tuple[int, dict[str, Any]] | Exception | None] = asyncio.Queue()

        async def pump(index: int, answer: Answer) -> None:
            try:
                async for values in answer:
                    arrived.put_nowait((index * each + values.get("choice_index", 0), values))
                arrived.put_nowait(None)
            except Exception as error:  # of whoever reads
                arrived.put_nowait(error)

        tasks = [asyncio.ensure_future(pump(index, answer)) for index, answer in enumerate(answers)]
        left = len(tasks)
        while left:
            got = await arrived.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            await answer.close()


class _Stream(StreamingResponse):
    """Server-sent events; closes the requests behind them even when the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], answers: list[Answer]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                await answer.close()


async def _collect(merged: AsyncIterator[tuple[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """The one response of each answer that is not streamed."""
    async with contextlib.aclosing(merged) as source:  # type: ignore[type-var]
        return {index: values async for index, values in source}


async def _events(
    merged: AsyncIterator[tuple[int, dict[str, Any]]],
    head: dict[str, Any],
    choices: list[Choice],
    each: int,
    wants_usage: bool,
) -> AsyncIterator[str]:
    """Triton's events as the API's; leaving early closes the connections, which cancels the request."""
    ends = []
    more = {"usage": None} if wants_usage else {}
    async with contextlib.aclosing(merged) as source:  # type: ignore[type-var]
        try:
            for choice in choices:
                for piece in choice.opening():
                    yield _event(head | {"choices": [piece]} | more)
            async for index, values in source:
                for piece in choices[index].pieces(values):
                    yield _event(head | {"choices": [piece]} | more)
                if values.get("finish_reason"):
                    ends.append(values)
            if wants_usage:
                yield _event(head | {"choices": [], "usage": usage(ends, each)})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error_body(error.status, error.message))


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is given up when the client leaves: Triton then sees its connection close."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
