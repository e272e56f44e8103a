"""An HTTP proxy that misbehaves when told to: for stores that are reached over HTTP."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Literal

_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)
_STATUS_TEXT = {429: "Too Many Requests", 500: "Internal Server Error", 501: "Not Implemented"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do with a request instead of passing it on and its answer back.

    Attributes:
        kind: answer `status`; cut the answer after `after_bytes` of its body; stall there; reset
            the connection at once.
        status: for `status`.
        after_bytes: for `cut` and `stall`.
        times: requests that it still applies to; -1 = all.
        method: only for requests of this method; "" = any.
        is_conditional: only for requests with If-None-Match.
    """

    kind: Literal["status", "cut", "stall", "reset"]
    status: int = 503
    after_bytes: int = 0
    times: int = -1
    method: str = ""
    is_conditional: bool = False


class BadHttp:
    """Stands in front of the HTTP server at `port` of 127.0.0.1; an async context manager.

    Set `fault` at any time; None = pass everything on. `requests` has (method, path) of all.
    """

    def __init__(self, port: int) -> None:
        self._backend_port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = -1
        self._fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def fault(self) -> Fault | None:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._fault, self._left = fault, fault.times if fault else -1

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader, writer):
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(_body_bytes(head))
                method, path = head.split(b" ", 2)[:2]
                self.requests.append((method.decode(), path.decode()))
                if not await self._answer(head, body, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client went away
        finally:
            writer.close()

    def _take_fault(self, head: bytes) -> Fault | None:
        fault = self._fault
        if fault is None or not self._left:
            return None
        if not head.startswith(fault.method.encode()):
            return None
        if fault.is_conditional and b"if-none-match" not in head.lower():
            return None
        self._left -= 1
        return fault

    async def _answer(self, head: bytes, body: bytes, writer) -> bool:
        """Answer one request; whether the connection goes on."""
        fault = self._take_fault(head)
        if fault and fault.kind == "reset":
            writer.transport.abort()
            return False
        if fault and fault.kind == "status":
            text = _STATUS_TEXT.get(fault.status, "Service Unavailable")
            writer.write(f"HTTP/1.1 {fault.status} {text}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return True
        backend_reader, backend_writer = await asyncio.open_connection(
            "127.0.0.1", self._backend_port
        )
        try:
            closing = head[:-2] + b"Connection: close\r\n\r\n"
            backend_writer.write(closing + body)
            answer_head = await backend_reader.readuntil(b"\r\n\r\n")
            answer = await backend_reader.read(-1)
        finally:
            backend_writer.close()
        if fault is not None:
            writer.write(answer_head + answer[: fault.after_bytes])
            await writer.drain()
            if fault.kind == "stall":
                await asyncio.sleep(3600)
            return False
        writer.write(answer_head + answer)
        await writer.drain()
        return False  # the answer's head says that the connection ends


def _body_bytes(head: bytes) -> int:
    found = _LENGTH.search(head)
    return int(found[1]) if found else 0
