"""Runs the application in a thread of its own, beside what watches tritonserver."""

from __future__ import annotations

import asyncio
import threading
from typing import Self

from aiohttp import web

from kvfetcher.errors import ServerError
from kvfetcher.openai.app import make_app
from kvfetcher_client import AsyncClient

_START_SECONDS = 10.0
_STOP_SECONDS = 5.0


class OpenAIServer:
    """OpenAI's API on a port, from `start` to `close`.

    Args:
        host: address to bind to.
        port: TCP port; 0 = any free one.
        grpc_url: ``host:port`` of the server behind. It may be restarted meanwhile.
        model: the name under which the model is listed.
        default_max_tokens: of a chat that names no limit.
    """

    def __init__(
        self, host: str, port: int, *, grpc_url: str, model: str, default_max_tokens: int
    ) -> None:
        self._address = (host, port)
        self._grpc_url = grpc_url
        self._model = model
        self._default_max_tokens = default_max_tokens
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvfetcher-openai", daemon=True
        )
        self._client: AsyncClient | None = None
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The base URL that clients take: ``http://host:port/v1``."""
        assert self._runner is not None, "not started"
        host, port = self._runner.addresses[0][:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def start(self) -> Self:
        """Listen.

        Raises:
            ServerError: the address cannot be bound.
        """
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(_START_SECONDS)
        except OSError as exc:
            self.close()
            host, port = self._address
            raise ServerError(
                f"the OpenAI entrance cannot listen on {host}:{port}: {exc.strerror or exc};"
                " choose another port with --openai PORT (server.openai_port)"
            ) from exc
        return self

    async def _open(self) -> None:
        self._client = AsyncClient(self._grpc_url)
        app = make_app(self._client, model=self._model, default_max_tokens=self._default_max_tokens)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_STOP_SECONDS
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, *self._address).start()

    def close(self) -> None:
        """Stop listening and end what is open. Safe to call twice."""
        if not self._thread.is_alive():
            return
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        closing.result(2 * _STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._client is not None:
            await self._client.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
