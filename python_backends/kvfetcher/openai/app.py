"""The HTTP routes, on aiohttp: /v1/chat/completions, /v1/completions, /v1/models, /health.

A client that goes away ends its request: aiohttp cancels the handler, which closes the gRPC stream.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

from kvfetcher.errors import KVFetcherError, RequestError
from kvfetcher.openai import schema
from kvfetcher_client import ResponseTimeoutError, ServerUnavailableError, UnsupportedError
from kvfetcher_client.protocol import Assembler

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from kvfetcher.openai.schema import AskedFor, Kind
    from kvfetcher_client import AsyncClient, Delta

MAX_BODY_BYTES = 16 << 20
"""A prompt of a million tokens is about 4 MB."""

_log = logging.getLogger(__name__)


class Routes:
    """What each address answers.

    Args:
        client: client of the server behind; belongs to the running loop.
        model: the name under which the model is listed and asked for.
        default_max_tokens: of a chat that names no limit.
    """

    def __init__(self, client: AsyncClient, *, model: str, default_max_tokens: int) -> None:
        self._client = client
        self._model = model
        self._default_max_tokens = default_max_tokens
        self._started = int(time.time())

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._answer("chat", request)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._answer("completion", request)

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return web.json_response(schema.models(self._model, self._started))

    async def one_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/NAME."""
        self._check_model(request.match_info["name"])
        return web.json_response(schema.model(self._model, self._started))

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 while requests can be taken."""
        return web.Response(status=200 if await self._client.is_ready() else 503)

    def _check_model(self, name: str) -> None:
        if name not in (self._model, "kvfetcher"):
            raise _UnknownModelError(
                f"the model {name!r} does not exist; this server has {self._model!r}"
            )

    async def _answer(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = schema.parse_request(kind, body, default_max_tokens=self._default_max_tokens)
        self._check_model(asked.model)
        prompt = asked.prompt
        if kind == "chat":
            prompt = await self._client.chat_prompt(asked.messages)
        deltas = self._client.stream(prompt, **asked.options)
        async with contextlib.aclosing(deltas):
            if asked.stream:
                return await _stream(request, asked, deltas)
            answer = Assembler()
            async for delta in deltas:
                answer.add(delta, 0.0)
        result = answer.finish(0.0)
        used = schema.usage(result.report, len(result.output_ids))
        return web.json_response(schema.whole(asked, result.text, result.finish_reason, used))


async def _stream(
    request: web.Request, asked: AskedFor, deltas: AsyncGenerator[Delta]
) -> web.StreamResponse:
    """Server-sent events. An error before the first piece is an ordinary answer with its status."""
    answer = Assembler()
    first = await anext(deltas)
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)

    async def send(data: dict[str, Any] | None) -> None:
        if data is not None:
            await response.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())

    async def send_delta(delta: Delta) -> None:
        answer.add(delta, 0.0)
        if delta.text or delta.finish_reason:
            await send(schema.piece(asked, delta.text, delta.finish_reason))

    await send(schema.first_piece(asked))
    await send_delta(first)
    try:
        async for delta in deltas:
            await send_delta(delta)
    except KVFetcherError as exc:  # the status line is out already
        await send(_error_body(exc)[1])
        return response
    if asked.include_usage:
        result = answer.finish(0.0)
        await send(schema.usage_piece(asked, schema.usage(result.report, len(result.output_ids))))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


class _UnknownModelError(RequestError):
    """The request names a model that is not served."""


def _error_body(exc: KVFetcherError) -> tuple[int, dict[str, Any]]:
    if isinstance(exc, _UnknownModelError):
        return 404, schema.error(str(exc), "invalid_request_error", "model_not_found")
    if isinstance(exc, UnsupportedError) or exc.triton_status == "UNSUPPORTED":
        return 400, schema.error(str(exc), "invalid_request_error", "unsupported")
    if isinstance(exc, RequestError):
        return 400, schema.error(str(exc), "invalid_request_error")
    if isinstance(exc, ServerUnavailableError):
        return 503, schema.error(str(exc), "server_error", "unavailable")
    if isinstance(exc, ResponseTimeoutError):
        return 504, schema.error(str(exc), "server_error", "timeout")
    return 500, schema.error(str(exc), "server_error")


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every failure in OpenAI's form."""
    try:
        return await handler(request)
    except KVFetcherError as exc:
        status, body = _error_body(exc)
        return web.json_response(body, status=status)
    except web.HTTPRequestEntityTooLarge:
        text = f"the body may have {MAX_BODY_BYTES} bytes at most"
        body = schema.error(text, "invalid_request_error", "too_large")
        return web.json_response(body, status=413)
    except web.HTTPException as exc:
        text = f"{request.method} {request.path}: {exc.reason}; there are /v1/chat/completions,"
        body = schema.error(
            f"{text} /v1/completions and /v1/models", "invalid_request_error", "unknown_url"
        )
        return web.json_response(body, status=exc.status)
    except Exception as exc:  # noqa: BLE001 - the boundary
        _log.exception("unexpected %s", type(exc).__name__)
        body = schema.error(f"{type(exc).__name__}; the server's log tells more", "server_error")
        return web.json_response(body, status=500)


def make_app(client: AsyncClient, *, model: str, default_max_tokens: int) -> web.Application:
    """The application, for an `aiohttp.web.AppRunner`; arguments as for `Routes`."""
    routes = Routes(client, model=model, default_max_tokens=default_max_tokens)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completion)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/v1/models/{name}", routes.one_model)
    app.router.add_get("/health", routes.health)
    return app
