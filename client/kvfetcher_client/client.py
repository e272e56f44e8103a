"""The clients: one gRPC stream per request, so that each can be cancelled by itself."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kvfetcher import wire
from kvfetcher_client.errors import RequestError, from_call_error, from_rpc_error
from kvfetcher_client.protocol import (
    Assembler,
    Delta,
    Generation,
    KVReport,
    Options,
    build_prompt_request,
    build_request,
    build_warm_request,
    check_finished,
    checked_report,
    is_last,
    parse_prompt,
    parse_report,
    parse_response,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_TIMEOUT_SECONDS = 300.0

_READY_TIMEOUT_SECONDS = 5.0

# Prompts of any length: the server sets the limit, and says so.
_CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_NO_PROXY = ("grpc.enable_http_proxy", 0)


class Client:
    """Blocking client. Thread-safe; requests of several threads run at once.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     answer = client.generate("Why is the sky blue?", max_tokens=64)
        >>> answer.text, answer.finish_reason, answer.report.hit_tokens
        ('It scatters blue light.', 'stop', 8)

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
        timeout_seconds: longest wait for a whole answer.
        model: the ensemble's name.

    Raises:
        RequestError: `url` is not ``host:port``.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        model: str = wire.KVFETCHER,
    ) -> None:
        self.url = _checked_url(url)
        self._timeout_seconds = timeout_seconds
        self._model = model
        self._channel = grpc.insecure_channel(url, options=_channel_options(url))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running requests are cancelled."""
        self._channel.close()

    def is_ready(self) -> bool:
        """Whether the server answers and its model takes requests now."""
        request = service_pb2.ModelReadyRequest(name=self._model)
        try:
            return bool(self._stub.ModelReady(request, timeout=_READY_TIMEOUT_SECONDS).ready)
        except grpc.RpcError:
            return False

    def generate(self, prompt: str, **options: Unpack[Options]) -> Generation:
        """Ask, and wait for the whole answer.

        Args:
            prompt: the text to go on from; put what requests share (a document) first.
            options: see `Options`.

        Raises:
            RequestError: the request breaks a rule.
            ServerUnavailableError: nobody answers, or the server is full.
            ResponseTimeoutError: no whole answer in time.
            ResponseError: the server failed.
        """
        start = time.monotonic()
        answer = Assembler()
        for delta in self.stream(prompt, **options):
            answer.add(delta, time.monotonic() - start)
        return answer.finish(time.monotonic() - start)

    def stream(self, prompt: str, **options: Unpack[Options]) -> Generator[Delta]:
        """Ask, and get the answer piece by piece. Closing the generator cancels the request.

        Arguments and errors as for `generate`. The request is sent at the first step.

        Example:
            >>> with Client("127.0.0.1:8001") as client:
            ...     [delta.text for delta in client.stream("Why is the sky blue?")]
            ['It scatters', ' blue light.']
        """
        request = build_request(prompt, options, model=self._model)
        return self._stream(request)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]) -> Generation:
        """Continue a chat, in the form that the served model was trained on.

        Args:
            messages: each ``{"role": "system" | "user" | "assistant", "content": TEXT}``; put what
                chats share (a document) into the first ones.
            options: see `Options`.

        Raises:
            UnsupportedError: the served model has no chat template; use `generate`.
            ClientError: as `generate`.

        Example:
            >>> question = {"role": "user", "content": "What is borrowing?"}
            >>> with Client("127.0.0.1:8001") as client:
            ...     client.chat([question]).text  # doctest: +SKIP
            'Borrowing is ...'
        """
        return self.generate(self.chat_prompt(messages), **options)

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Generator[Delta]:
        """`chat`, piece by piece; closing the generator cancels the request."""
        return self.stream(self.chat_prompt(messages), **options)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the served model's chat template makes of messages.

        Raises:
            UnsupportedError: the served model has no chat template.
            ClientError: as `generate`.
        """
        request = build_prompt_request(messages)
        try:
            response = self._stub.ModelInfer(request, timeout=self._timeout_seconds)
        except grpc.RpcError as exc:
            raise from_call_error(self.url, exc, timeout_seconds=self._timeout_seconds) from exc
        return parse_prompt(response)

    def warm(self, prompt: str | Sequence[int], *, cache_salt: str = "") -> KVReport:
        """Have the server copy the stored chunks of a prompt into its tier; nothing is generated.

        Args:
            prompt: text, or the token ids of the server's tokenizer.
            cache_salt: as in the requests that will follow.

        Returns:
            What was found and read. Errors as for `generate`.
        """
        if isinstance(prompt, str):
            return self.generate(prompt, kv_policy="warm", cache_salt=cache_salt).report
        request = build_warm_request(prompt, cache_salt=cache_salt)
        call = self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout_seconds)
        report = None
        try:
            for response in call:
                report = parse_report(self.url, response) or report
        except grpc.RpcError as exc:
            raise from_rpc_error(self.url, exc, timeout_seconds=self._timeout_seconds) from exc
        finally:
            call.cancel()
        return checked_report(self.url, report)

    def _stream(self, request: service_pb2.ModelInferRequest) -> Generator[Delta]:
        call = self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout_seconds)
        delta: Delta | None = None
        ending = False
        try:
            for response in call:
                ending = is_last(response)
                parsed = parse_response(self.url, response, request_id=request.id)
                if parsed is not None:
                    delta = parsed
                    yield delta
        except grpc.RpcError as exc:
            ending = False
            raise from_rpc_error(self.url, exc, timeout_seconds=self._timeout_seconds) from exc
        finally:
            if ending:
                _drain(call)
            else:
                call.cancel()
        check_finished(delta)


class AsyncClient:
    """Client for asyncio; belongs to the event loop in which it was made.

    Example:
        >>> async def ask() -> str:
        ...     async with AsyncClient("127.0.0.1:8001") as client:
        ...         answer = await client.generate("Why is the sky blue?", max_tokens=64)
        ...     return answer.text
        >>> import asyncio
        >>> asyncio.run(ask())
        'It scatters blue light.'

    Arguments as for `Client`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        model: str = wire.KVFETCHER,
    ) -> None:
        self.url = _checked_url(url)
        self._timeout_seconds = timeout_seconds
        self._model = model
        self._channel = grpc.aio.insecure_channel(url, options=_channel_options(url))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running requests are cancelled."""
        await self._channel.close()

    async def is_ready(self) -> bool:
        """Whether the server answers and its model takes requests now."""
        request = service_pb2.ModelReadyRequest(name=self._model)
        try:
            return bool(
                (await self._stub.ModelReady(request, timeout=_READY_TIMEOUT_SECONDS)).ready
            )
        except grpc.RpcError:
            return False

    async def generate(self, prompt: str, **options: Unpack[Options]) -> Generation:
        """Ask, and wait for the whole answer; as `Client.generate`."""
        start = time.monotonic()
        answer = Assembler()
        async for delta in self.stream(prompt, **options):
            answer.add(delta, time.monotonic() - start)
        return answer.finish(time.monotonic() - start)

    def stream(self, prompt: str, **options: Unpack[Options]) -> AsyncGenerator[Delta]:
        """Ask, and get the answer piece by piece; as `Client.stream` (``aclose`` cancels)."""
        request = build_request(prompt, options, model=self._model)
        return self._stream(request)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Generation:
        """Continue a chat; as `Client.chat`."""
        return await self.generate(await self.chat_prompt(messages), **options)

    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> AsyncGenerator[Delta]:
        """`chat`, piece by piece; ``aclose`` cancels."""
        deltas = self.stream(await self.chat_prompt(messages), **options)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of messages; as `Client.chat_prompt`."""
        request = build_prompt_request(messages)
        try:
            response = await self._stub.ModelInfer(request, timeout=self._timeout_seconds)
        except grpc.RpcError as exc:
            raise from_call_error(self.url, exc, timeout_seconds=self._timeout_seconds) from exc
        return parse_prompt(response)

    async def warm(self, prompt: str | Sequence[int], *, cache_salt: str = "") -> KVReport:
        """Bring the stored chunks of a prompt near; as `Client.warm`."""
        if isinstance(prompt, str):
            return (await self.generate(prompt, kv_policy="warm", cache_salt=cache_salt)).report
        request = build_warm_request(prompt, cache_salt=cache_salt)
        call: Any = self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout_seconds)
        report = None
        try:
            async for response in call:
                report = parse_report(self.url, response) or report
        except grpc.RpcError as exc:
            raise from_rpc_error(self.url, exc, timeout_seconds=self._timeout_seconds) from exc
        finally:
            call.cancel()
        return checked_report(self.url, report)

    async def _stream(self, request: service_pb2.ModelInferRequest) -> AsyncGenerator[Delta]:
        call: Any = self._stub.ModelStreamInfer(iter([request]), timeout=self._timeout_seconds)
        delta: Delta | None = None
        ending = False
        try:
            async for response in call:
                ending = is_last(response)
                parsed = parse_response(self.url, response, request_id=request.id)
                if parsed is not None:
                    delta = parsed
                    yield delta
        except grpc.RpcError as exc:
            ending = False
            raise from_rpc_error(self.url, exc, timeout_seconds=self._timeout_seconds) from exc
        finally:
            if ending:
                await _drain_async(call)
            else:
                call.cancel()
        check_finished(delta)


# A stream whose last response is here is read to its end, not cancelled: Triton 2.51 may crash or
# keep the request for ever when a cancellation meets the end of its stream (8 of 18 tries).
def _drain(call: Any) -> None:
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass


async def _drain_async(call: Any) -> None:
    with contextlib.suppress(grpc.RpcError):
        async for _ in call:
            pass


def _channel_options(url: str) -> list[tuple[str, int]]:
    """Options of a channel; a server of this machine is never reached through a proxy.

    gRPC sends connections to 127.0.0.1 through $http_proxy unless $no_proxy names it.
    """
    host = url.rpartition(":")[0].strip("[]").lower()
    is_here = host in ("localhost", "::1") or host.startswith("127.")
    return [*_CHANNEL_OPTIONS, _NO_PROXY] if is_here else _CHANNEL_OPTIONS


def _checked_url(url: str) -> str:
    host, _, port = url.rpartition(":")
    if not host or not port.isdecimal() or "/" in url:
        raise RequestError(
            f"url must be host:port of the gRPC endpoint, such as {DEFAULT_URL}, got {url!r}"
        )
    return url
